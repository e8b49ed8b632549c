// What a launch is given, how arrays are read and written, and what a block works on.

// The same for each kernel; ARGUMENTS in gpu/arguments.py mirrors it.
struct Arguments {
    const void* features;      // (N, C, H, W)
    const void* grad_output;   // (K, C, bins_y, bins_x)
    const void* boxes;         // (K, 4 or 5)
    const void* batch_indices; // (K,)
    void* result;              // crops, or the gradient with respect to the features or the boxes
    void* workspace;           // what one kernel leaves for the next
    const void* directions[2]; // each like the boxes: changes of them, along which to take the derivative
    long long feature_strides[4], output_strides[4], box_strides[2], index_stride, direction_strides[4];  // in elements
    long long images, count, first_block;  // N, K, and the number of the first block of this launch
    int channels, size[2], index_kind, box_columns, direction_count;
    int tile[2], channels_at_once;      // the most that a block works on, of an item: see Task
    int blocks_per_item;
    int zones[3], zone_pixels[2];       // how boxes are marked for the tiles that they touch: see feature_gradient.cu
    int packed_features, packed_crops;  // whether LANES channels, the first of them a multiple of LANES, are one pack
    Rule rule;
};

// ---- elements ----

struct Bfloat16 { unsigned short bits; };

DEVICE float load(Bfloat16 v) { return __uint_as_float((unsigned)v.bits << 16); }
DEVICE void store(Bfloat16& to, float v) {  // to nearest, ties to even; NaN stays one
    const unsigned bits = __float_as_uint(v);
    to.bits = (bits & 0x7fffffffu) > 0x7f800000u ? (unsigned short)(bits >> 16 | 64)
                                                 : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
template <typename Element>
DEVICE Element load(Element v) { return v; }
DEVICE void store(float& to, float v) { to = v; }
DEVICE void store(double& to, double v) { to = v; }

typedef FEATURE Feature;  // as stored
typedef RESULT Result;
typedef GRAD Grad;

#define NAN_VALUE __longlong_as_double(0x7ff8000000000000LL)

// Neighbouring channels that are adjacent in memory: aligned to the largest power of two that divides their size, up to
// 16 bytes, which an access can take.
DEVICE constexpr int alignment_of(int size) { return size % 16 == 0 ? 16 : size & -size; }
template <typename Element>
struct alignas(alignment_of(LANES * sizeof(Element))) Pack { Element lane[LANES]; };

// `count` channels of one pixel or bin, `stride` elements apart; 0 for the others of LANES. A thread works on LANES
// channels together: they share all that depends on the pixel, and their reads do not wait for each other. `whole` is
// known at compile time, so that reads in a loop do not wait for each other either: see `by_lanes`.
template <typename Element, typename Whole>
DEVICE void read_lanes(Whole whole, const void* from, Offset offset, Offset stride, int count, Compute* to) {
    const Element* first = (const Element*)from + offset;
    if (CHANNELS_LAST && whole) {
        const Pack<Element> pack = read_pack((const Pack<Element>*)first);
        UNROLL for (int l = 0; l < LANES; ++l) to[l] = (Compute)load(pack.lane[l]);
    } else {
        UNROLL for (int l = 0; l < LANES; ++l, first += stride)
            to[l] = whole || l < count ? (Compute)load(*first) : (Compute)0;
    }
}

template <bool VALUE>
struct Constant {
    __device__ constexpr operator bool() const { return VALUE; }
};

// Calls `work(whole)`: whether all of LANES are read and, where channels are adjacent, as one pack.
template <typename Work>
DEVICE void by_lanes(int count, bool packed, Work work) {
    if (count == LANES && (packed || !CHANNELS_LAST)) work(Constant<true>());
    else work(Constant<false>());
}

DEVICE void write_lanes(void* to, Offset offset, Offset stride, int count, bool packed, const Compute* from) {
    Result* first = (Result*)to + offset;
    if (CHANNELS_LAST && packed && count == LANES) {
        Pack<Result> pack;
        UNROLL for (int l = 0; l < LANES; ++l) store(pack.lane[l], from[l]);
        write_pack((Pack<Result>*)first, pack);
    } else {
        UNROLL for (int l = 0; l < LANES; ++l)
            if (l < count) store(first[l * stride], from[l]);
    }
}

// ---- boxes ----

// The image of a box, or -1 if it has none.
DEVICE long long image_of(const Arguments& a, long long k) {
    const long long at = k * a.index_stride;
    long long image = -1;
    switch (a.index_kind) {
        case 1: image = ((const signed char*)a.batch_indices)[at]; break;
        case 2: image = ((const short*)a.batch_indices)[at]; break;
        case 4: image = ((const int*)a.batch_indices)[at]; break;
        case 8: image = ((const long long*)a.batch_indices)[at]; break;
        case -1: image = ((const unsigned char*)a.batch_indices)[at]; break;
        case -2: image = ((const unsigned short*)a.batch_indices)[at]; break;
        case -4: image = ((const unsigned*)a.batch_indices)[at]; break;
        case -8: {
            const unsigned long long wide = ((const unsigned long long*)a.batch_indices)[at];
            image = wide < (unsigned long long)a.images ? (long long)wide : -1;
            break;
        }
        default: {
            const Box v = ((const Box*)a.batch_indices)[at], nearest = rint(v);
            if (fabs(v - nearest) <= (Box)(1.0 / 64) && nearest >= 0 && nearest < (Box)9e18) image = (long long)nearest;
        }
    }
    return image >= 0 && image < a.images ? image : -1;
}

// A box's edges: low y, low x, high y, high x.
DEVICE void edges_of(const Arguments& a, long long k, Real* edges) {
    for (int i = 0; i < 4; ++i)
        edges[i] = convert(((const Box*)a.boxes)[k * a.box_strides[0] + a.rule.columns[i] * a.box_strides[1]], Real());
}

// A box's edges; returns its image, or -1 for a broken box: a coordinate that is not finite, or no image.
DEVICE long long open_box(const Arguments& a, long long k, Real* edges) {
    const long long image = image_of(a, k);  // first, so that one read need not wait for the other
    edges_of(a, k, edges);
    return finite_box(edges) ? image : -1;
}

// ---- derivatives along directions ----

// Which of the directions an axis takes in a term, or -1: `terms` of rule.py.
DEVICE int term_count(const Arguments& a) { return a.direction_count == 0 ? 1 : 2; }
DEVICE int direction_of(const Arguments& a, int term, int axis) {
    if (a.direction_count == 0) return -1;
    return axis == term ? 0 : a.direction_count == 2 ? 1 : -1;
}

// How an axis of a box changes along a direction. Where it does, weights are the changes of weights.
struct Change {
    bool wanted;
    Compute start, step;
};

DEVICE Change change_of(const Arguments& a, long long k, int term, int axis) {
    const int direction = direction_of(a, term, axis);
    if (direction < 0) return {false, 0, 0};
    Real edges[4];
    edges_of(a, k, edges);
    const EdgeSlopes slopes = edge_slopes(a.rule, edges[axis], edges[axis + 2], a.rule.bins[axis], a.size[axis]);
    const Box* row = (const Box*)a.directions[direction] + k * a.direction_strides[2 * direction];
    const double low = row[a.rule.columns[axis] * a.direction_strides[2 * direction + 1]];
    const double high = row[a.rule.columns[axis + 2] * a.direction_strides[2 * direction + 1]];
    return {true, (Compute)(low * slopes.start[0] + high * slopes.start[1]), (Compute)((high - low) * slopes.step)};
}

// ---- a block's work ----

// A tile of an item (of a box's bins, or of an image's pixels), for some of its channels. In shared memory: it is the same
// for all threads of a block, and registers are scarce.
struct Task {
    long long item;
    int first[2], extent[2];  // of the tile, along y and x
    int first_channel, channels;
    int number;               // among the blocks of its item

    // Sets that of the current block. Blocks with numbers near each other run together. `by_channels`: they are those of
    // many items for the same channels, whose pixels stay in the L2 cache; otherwise, those of an item.
    __device__ void find(const Arguments& a, bool by_channels, const int* size) {
        if (threadIdx.x == 0) assign(a, by_channels, size);
        __syncthreads();
    }

    __device__ void assign(const Arguments& a, bool by_channels, const int* size) {
        const int groups = (a.channels + a.channels_at_once - 1) / a.channels_at_once, tiles = a.blocks_per_item / groups;
        const long long block = a.first_block + blockIdx.x, tiles_of_all = by_channels ? a.count * tiles : 0;
        const int group = (int)(by_channels ? block / tiles_of_all : block % groups);
        const long long left = by_channels ? block % tiles_of_all : block / groups;
        const int tile = (int)(left % tiles), tiles_x = (size[1] + a.tile[1] - 1) / a.tile[1];
        item = left / tiles;
        number = group * tiles + tile;
        first[0] = tile / tiles_x * a.tile[0];
        first[1] = tile % tiles_x * a.tile[1];
        for (int axis = 0; axis < 2; ++axis) extent[axis] = min(a.tile[axis], size[axis] - first[axis]);
        first_channel = group * a.channels_at_once;
        channels = min(a.channels_at_once, a.channels - first_channel);
    }

    // Bins or pixels of the tile, each for LANES channels.
    __device__ int spots() const { return (channels + LANES - 1) / LANES * extent[0] * extent[1]; }
};

// One of a task's spots. Successive spots are adjacent in memory or, with `by_rows`, at least of one row of pixels: those
// that a box does not touch are then left out by a whole warp.
struct Spot {
    int y, x;            // in the tile
    // The first of its channels, and how many it has; 0 or less: there is no such spot. A maximum with 0 is not taken:
    // for sm_90 the compilers of CUDA 12.9 to 13.2 then make `lanes == LANES` of any number but 0.
    int channel, lanes;

    __device__ Spot(const Task& task, int number, bool by_rows) {
        const int groups = (task.channels + LANES - 1) / LANES, width = task.extent[1], height = task.extent[0];
        int group;
        if (CHANNELS_LAST) group = number % groups, x = number / groups % width, y = number / groups / width;
        else if (by_rows) x = number % width, group = number / width % groups, y = number / width / groups;
        else x = number % width, y = number / width % height, group = number / width / height;
        lanes = y < height ? min(LANES, task.channels - group * LANES) : 0;
        channel = task.first_channel + group * LANES;
    }
};
