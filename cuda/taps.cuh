// A box's weights on the pixels, for the bins of a tile: computed once by a few threads and shared by the block, for all
// of its channels.

const int MOST_TAPS = 256 / MOST_BINS;  // taps per bin and axis that are held at a time

struct Weight {
    Compute value;
    __device__ void clear() { value = 0; }
    __device__ bool is_zero() const { return value == 0; }
    __device__ void add_slope(Compute, Compute) {}
};

// With its derivatives with respect to the axis's start and step.
struct SlopedWeight {
    Compute value, to_start, to_step;
    __device__ void clear() { value = to_start = to_step = 0; }
    __device__ bool is_zero() const { return value == 0 && to_start == 0 && to_step == 0; }
    __device__ void add_slope(Compute slope, Compute lever) {
        to_start += slope;
        to_step += slope * lever;
    }
};

template <typename W>
struct Tap {
    Offset offset;  // of the pixel along its axis
    W weight;
};

// The taps of one bin in the order of its samples, those on one pixel merged, as many at a time as there is room for.
// Positions are monotonic, so the samples that touch a pixel follow each other; two pixels, base and base + 1, are open
// at a time.
template <typename W>
struct TapStream {
    Axis axis;
    Change change;
    Real origin;
    long long next, stop;
    int bin, size, base;
    bool open, started;  // started: whether some have been read
    W low, high;         // of the two open pixels

    __device__ void start() {
        origin = origin_of(axis, bin);
        candidates(axis, origin, -1, size, next, stop);
        open = started = false;
    }

    // At most MOST_TAPS taps; returns how many. `more`: whether others follow. `stride`: of the axis, in elements.
    __device__ int read(const Rule& rule, Offset stride, Tap<W>* taps, bool& more) {
        int count = 0;
        const auto write = [&](int pixel, W& weight) {
            if (!weight.is_zero()) taps[count++] = {(Offset)pixel * stride, weight};
            weight.clear();
        };
        const Compute each = (Compute)1 / (Compute)axis.samples;
        while (next < stop && count + 2 <= MOST_TAPS) {
            const Real position = position_of(rule, axis, origin, next);
            const long long i = next++;
            if (!is_inside(rule, position, size)) continue;
            const Taps at = taps_of(rule, position, size);
            if (open && at.low == base + 1) {
                write(base, low);
                low = high;
                high.clear();
            } else if (open && at.low == base - 1) {
                write(base + 1, high);
                high = low;
                low.clear();
            } else if (!open || at.low != base) {
                if (open) {
                    write(base, low);
                    write(base + 1, high);
                }
                low.clear();
                high.clear();
            }
            base = at.low;
            open = true;
            const Compute fraction = (Compute)at.fraction, lever = lever_of(rule, bin, i, each);
            const bool two = at.high > at.low;
            if (!change.wanted) {
                low.value += (1 - fraction) * each;
                (two ? high : low).value += fraction * each;
                if (two) {
                    low.add_slope(-each, lever);
                    high.add_slope(each, lever);
                }
            } else if (two) {  // a change has no slope: positions are linear in the box, and weights in the position
                const Compute slope = (change.start + lever * change.step) * each;
                low.value -= slope;
                high.value += slope;
            }
        }
        if (next == stop && open && count + 2 <= MOST_TAPS) {
            write(base, low);
            write(base + 1, high);
            open = false;
        }
        more = next < stop || open;
        return count;
    }
};

// The taps of a tile's bins along one axis, in shared memory.
template <typename W>
struct TapTable {
    int count[MOST_BINS];
    Offset first[MOST_BINS];                // of a bin's first pixel, which stays the same from batch to batch
    Tap<W> taps[MOST_BINS][MOST_TAPS + 1];  // one more, so that bins lie in different banks
    TapStream<W> streams[MOST_BINS];

    // The next batch of a bin's taps; whether others follow.
    __device__ bool read(const Arguments& a, int axis, int bin) {
        bool more;
        TapStream<W> stream = streams[bin];
        count[bin] = stream.read(a.rule, (Offset)a.feature_strides[2 + axis], taps[bin], more);
        if (!stream.started) first[bin] = taps[bin][0].offset;
        stream.started = true;
        streams[bin] = stream;  // also of a bin that has no more, whose neighbours may have
        return more;
    }
};

// Calls `work(term)` with the taps of a box's bins in `along`, for y and x, and with its image in `image`: -1 for a
// broken box, which has no taps. Once for each term and, where bins have more taps than are held at a time, once for each
// batch of them. `held`: whether `along` still holds all that there is from an earlier call; set here where that is so.
template <typename W, typename Work>
DEVICE void for_taps(const Arguments& a, const Task& task, TapTable<W>* along, long long& image, bool& held, int terms,
                     Work work) {
    const int axis = threadIdx.x / 32, bin = threadIdx.x % 32;
    const bool reads_y = !held && axis == 0 && bin < task.extent[0], reads_x = !held && axis == 1 && bin < task.extent[1];
    const bool reads = reads_y || reads_x;
    TapStream<W>& mine = along[reads ? axis : 0].streams[reads ? bin : 0];
    if (!held) __syncthreads();  // before `image` is written again
    if (reads) {
        Real edges[4];
        const long long found = open_box(a, task.item, edges);
        if (threadIdx.x == 0) image = found;
        mine.axis = {0, 0, 0};
        if (found >= 0) mine.axis = affine(a.rule, edges[axis], edges[axis + 2], a.rule.bins[axis], a.size[axis]);
        mine.change = {false, 0, 0};
        mine.bin = task.first[axis] + bin;
        mine.size = a.size[axis];
    }
    bool all = terms == 1;
    for (int term = 0; term < terms; ++term) {
        if (reads && terms > 1) mine.change = change_of(a, task.item, term, axis);
        // All batches along x for each along y.
        bool unread = false, more_x = false, more_y = false;
        do {
            if (reads_x || (reads_y && !more_x)) {
                if (reads_x ? !more_x : !more_y) mine.start();
                unread = along[axis].read(a, axis, bin);
            }
            more_x = !held && __syncthreads_or(reads_x && unread);
            work(term);
            more_y = !held && __syncthreads_or(reads_y && unread);  // also before the taps are overwritten
            if (more_x || more_y) all = false;
        } while (more_x || more_y);
    }
    held = held || all;
}

// What is subtracted from each of a bin's pixels, per channel, where weights add up to 0: one of these pixels, so that a
// common offset of the features costs no digits. Where that is NaN or infinite, 0. The same in each batch of taps.
template <typename W, typename Whole>
DEVICE void read_level(Whole whole, const Arguments& a, const TapTable<W>* along, const Spot& spot, Offset plane,
                       Compute* level) {
    read_lanes<Feature>(whole, a.features, plane + along[0].first[spot.y] + along[1].first[spot.x],
                        (Offset)a.feature_strides[1], spot.lanes, level);
    UNROLL for (int l = 0; l < LANES; ++l)
        if (!(level[l] - level[l] == 0)) level[l] = 0;
}
