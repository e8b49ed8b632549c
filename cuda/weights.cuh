// A box's weights along one axis, worked out once for a block and shared by all of its channels.

// One launch's arguments, the same for each kernel; numpy_dtype in kernels.py mirrors it.
struct Arguments {
    const void* features;      // (N, C, H, W)
    const void* grad_output;   // (K, C, bins_y, bins_x)
    const void* boxes;         // (K, 4 or 5)
    const void* batch_indices; // (K,)
    void* result;              // crops, a gradient to the features, or a gradient to the boxes
    const void* workspace;     // what an earlier kernel left for this one
    const void* directions[2]; // each like the boxes: changes of them, along which to take the derivative
    long long feature_strides[4], output_strides[4], box_strides[2], index_stride, direction_strides[4];  // in elements
    long long images, count, first_block;  // N, K, and the number of the first block of this launch
    int channels, size[2], index_kind, channels_at_once, box_columns, direction_count;
    Rule rule;
};

struct Bfloat16 { unsigned short bits; };

DEVICE float load(Bfloat16 v) { return __uint_as_float((unsigned)v.bits << 16); }
DEVICE void store(Bfloat16& to, float v) {  // to nearest, ties to even; NaN stays one
    const unsigned bits = __float_as_uint(v);
    to.bits = (bits & 0x7fffffffu) > 0x7f800000u ? (unsigned short)(bits >> 16 | 64)
                                                 : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
template <typename Number>
DEVICE Number load(Number v) { return v; }
DEVICE void store(float& to, float v) { to = v; }
DEVICE void store(double& to, double v) { to = v; }

typedef FEATURE Feature;  // as stored
typedef RESULT Result;
typedef GRAD Grad;

DEVICE Compute get(const void* from, Offset place) { return (Compute)load(((const Feature*)from)[place]); }

DEVICE Real edge(const Arguments& a, long long k, int column) {
    return (Real)((const Box*)a.boxes)[k * a.box_strides[0] + column * a.box_strides[1]];
}

// The image of a box, or -1 if it has none.
DEVICE long long image_of(const Arguments& a, long long k) {
    const long long place = k * a.index_stride;
    long long image = -1;
    switch (a.index_kind) {
        case 1: image = ((const signed char*)a.batch_indices)[place]; break;
        case 2: image = ((const short*)a.batch_indices)[place]; break;
        case 4: image = ((const int*)a.batch_indices)[place]; break;
        case 8: image = ((const long long*)a.batch_indices)[place]; break;
        case -1: image = ((const unsigned char*)a.batch_indices)[place]; break;
        case -2: image = ((const unsigned short*)a.batch_indices)[place]; break;
        case -4: image = ((const unsigned*)a.batch_indices)[place]; break;
        case -8: {
            const unsigned long long wide = ((const unsigned long long*)a.batch_indices)[place];
            image = wide < (unsigned long long)a.images ? (long long)wide : -1;
            break;
        }
        default: {
            const double v = widen(((const Box*)a.batch_indices)[place]), nearest = rint(v);
            if (fabs(v - nearest) <= 1.0 / 64 && nearest >= 0 && nearest < (double)a.images) image = (long long)nearest;
        }
    }
    return image >= 0 && image < a.images ? image : -1;
}

// A box that can be worked on: its image, and its two axes. False if it is broken.
DEVICE bool open_box(const Arguments& a, long long k, long long& image, Axis* axes) {
    Real edges[4];
    for (int i = 0; i < 4; ++i) edges[i] = edge(a, k, a.rule.columns[i]);
    image = image_of(a, k);
    if (image < 0 || !finite_box(edges)) return false;
    for (int axis = 0; axis < 2; ++axis) axes[axis] = resolve(a.rule, edges[axis], edges[axis + 2], axis, a.size[axis]);
    return true;
}

// Which of the directions an axis takes in a term, or -1: `terms` of geometry.py.
DEVICE int term_count(const Arguments& a) { return a.direction_count == 0 ? 1 : 2; }
DEVICE int direction_of(const Arguments& a, int term, int axis) {
    if (a.direction_count == 0) return -1;
    return axis == term ? 0 : a.direction_count == 2 ? 1 : -1;
}

// How an axis of a box changes along a direction. Where it does, weights are the changes of weights.
struct Change {
    bool wanted;
    Compute start, bin;
};

DEVICE Change change_of(const Arguments& a, long long k, const Axis* axes, int term, int axis) {
    const int direction = direction_of(a, term, axis);
    if (direction < 0) return {false, 0, 0};
    const Box* row = (const Box*)a.directions[direction] + k * a.direction_strides[2 * direction];
    const double low = row[a.rule.columns[axis] * a.direction_strides[2 * direction + 1]];
    const double high = row[a.rule.columns[axis + 2] * a.direction_strides[2 * direction + 1]];
    return {true, (Compute)(low * axes[axis].start_slope[0] + high * axes[axis].start_slope[1]),
            (Compute)((high - low) * axes[axis].bin_slope)};
}

// d position / d bin of sample i of a bin.
DEVICE Compute lever_of(const Rule& rule, int bin, long long i, Compute share) {
    const Compute offset = rule.dialect == ROI_ALIGN ? (Compute)0.5 : (Compute)0;
    return (Compute)bin + ((Compute)i + offset) * share;
}

const int TILE = 8;       // bins of an axis that a block works on together
const int MOST_TAPS = 16; // taps of a bin that it holds at a time

// The taps of one bin in the order of its samples, those on one pixel merged, as many at a time as there is room for.
//
// Positions go one way, so the samples that touch a pixel follow each other; two pixels, base and base + 1, are open
// at a time. With `Slopes` a tap also has the derivatives of its weight to the axis's start and bin.
template <bool Slopes>
struct TapStream {
    Axis axis;
    Change change;
    Real origin;
    long long next, stop;
    int bin, size, base;
    bool open;
    Compute weight[2], to_start[2], to_bin[2];

    __device__ void start(const Axis& of, const Change& along, int p, int pixels) {
        axis = of;
        change = along;
        bin = p;
        size = pixels;
        origin = origin_of(axis, p);
        candidates(axis, origin, -1, pixels, next, stop);
        open = false;
    }

    __device__ void clear(int i) { weight[i] = to_start[i] = to_bin[i] = 0; }

    __device__ void write(int i, int& count, int* pixel, Compute* w, Compute* s, Compute* b) {
        if (weight[i] != 0 || (Slopes && (to_start[i] != 0 || to_bin[i] != 0))) {
            pixel[count] = base + i;
            w[count] = weight[i];
            if (Slopes) {
                s[count] = to_start[i];
                b[count] = to_bin[i];
            }
            ++count;
        }
        clear(i);
    }

    __device__ void shift(int i) {  // pixel i of the two becomes the other
        weight[1 - i] = weight[i];
        to_start[1 - i] = to_start[i];
        to_bin[1 - i] = to_bin[i];
        clear(i);
    }

    // Writes at most MOST_TAPS taps; returns how many. `more` tells whether others follow.
    __device__ int read(const Rule& rule, int* pixel, Compute* w, Compute* s, Compute* b, bool& more) {
        int count = 0;
        while (next < stop && count + 2 <= MOST_TAPS) {
            const Taps taps = taps_of(rule, position_of(rule, axis, origin, next), size);
            const long long i = next++;
            if (!taps.inside) continue;
            if (open && taps.low == base + 1) {
                write(0, count, pixel, w, s, b);
                shift(1);
                base = taps.low;
            } else if (open && taps.low == base - 1) {
                write(1, count, pixel, w, s, b);
                shift(0);
                base = taps.low;
            } else if (!open || taps.low != base) {
                if (open) {
                    write(0, count, pixel, w, s, b);
                    write(1, count, pixel, w, s, b);
                } else {
                    clear(0);
                    clear(1);
                }
                base = taps.low;
                open = true;
            }
            const Compute share = (Compute)1 / (Compute)axis.samples, fraction = (Compute)taps.fraction;
            const int high = taps.high - taps.low;
            const Compute lever = lever_of(rule, bin, i, share);
            if (!change.wanted) {
                weight[0] += (1 - fraction) * share;
                weight[high] += fraction * share;
            } else if (high) {
                const Compute slope = (change.start + lever * change.bin) * share;
                weight[0] -= slope;
                weight[1] += slope;
            }
            if (Slopes && high) {
                to_start[0] -= share;
                to_start[1] += share;
                to_bin[0] -= share * lever;
                to_bin[1] += share * lever;
            }
        }
        more = next < stop;
        if (!more && open && count + 2 <= MOST_TAPS) {
            write(0, count, pixel, w, s, b);
            write(1, count, pixel, w, s, b);
            open = false;
        }
        more = more || open;
        return count;
    }
};

// The taps of up to TILE bins on one axis, in shared memory.
template <bool Slopes>
struct TapTable {
    int count[TILE];
    int pixel[TILE][MOST_TAPS];
    Compute weight[TILE][MOST_TAPS];
    Compute to_start[Slopes ? TILE : 1][Slopes ? MOST_TAPS : 1];
    Compute to_bin[Slopes ? TILE : 1][Slopes ? MOST_TAPS : 1];

    // Returns whether the bin has more taps than were read.
    __device__ bool read(const Rule& rule, TapStream<Slopes>& stream, int bin) {
        bool more;
        const int row = Slopes ? bin : 0;
        count[bin] = stream.read(rule, pixel[bin], weight[bin], to_start[row], to_bin[row], more);
        return more;
    }
};

#define NAN_VALUE __longlong_as_double(0x7ff8000000000000LL)

DEVICE Compute get_grad(const void* from, Offset place) { return (Compute)load(((const Grad*)from)[place]); }
DEVICE void put(void* to, Offset place, Compute value) { store(((Result*)to)[place], value); }

// What a block works on: a tile of an item (a box, or an image), for some of its channels.
struct Task {
    int first_channel, tile_y, tile_x;
    long long item;
};

DEVICE Task task_of(const Arguments& a, int tiles_y, int tiles_x) {
    const int parts = (a.channels + a.channels_at_once - 1) / a.channels_at_once;
    long long block = a.first_block + blockIdx.x;
    Task task;
    task.first_channel = (int)(block % parts) * a.channels_at_once;
    block /= parts;
    task.tile_x = (int)(block % tiles_x);
    block /= tiles_x;
    task.tile_y = (int)(block % tiles_y);
    task.item = block / tiles_y;
    return task;
}

// The thread's place among (channel, row, column), in the order in which neighbours lie together in memory.
template <typename Place>
DEVICE void split(Place place, int channels, int rows, int columns, int& c, int& y, int& x) {
    if (CHANNELS_LAST) {
        c = (int)(place % channels);
        place /= channels;
        x = (int)(place % columns);
        y = (int)(place / columns);
    } else {
        x = (int)(place % columns);
        place /= columns;
        y = (int)(place % rows);
        c = (int)(place / rows);
    }
}
