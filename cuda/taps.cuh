// A box's weights on the pixels, for the bins of a tile: worked out once by a few threads and shared by the block, for
// all of its channels.

const int MOST_TAPS = 16;  // of a bin that are held at a time

struct Weight {
    Compute value;
    __device__ void clear() { value = 0; }
    __device__ bool is_zero() const { return value == 0; }
    __device__ void slope(Compute, Compute) {}
};

// With derivatives to the axis's start and bin.
struct SlopedWeight {
    Compute value, to_start, to_bin;
    __device__ void clear() { value = to_start = to_bin = 0; }
    __device__ bool is_zero() const { return value == 0 && to_start == 0 && to_bin == 0; }
    __device__ void slope(Compute share, Compute lever) {
        to_start += share;
        to_bin += share * lever;
    }
};

template <typename W>
struct Tap {
    Offset place;  // of the pixel along its axis, in elements
    W weight;
};

// The taps of one bin in the order of its samples, those on one pixel merged, as many at a time as there is room for.
// Positions go one way, so the samples that touch a pixel follow each other; two pixels, base and base + 1, are open
// at a time.
template <typename W>
struct TapStream {
    Axis axis;
    Change change;
    Real origin;
    long long next, stop;
    int bin, size, base;
    bool open;
    W low, high;  // of the two open pixels

    __device__ void start() {
        origin = origin_of(axis, bin);
        candidates(axis, origin, -1, size, next, stop);
        open = false;
    }

    // At most MOST_TAPS taps; returns how many. `more` tells whether others follow.
    __device__ int read(const Rule& rule, Offset step, Tap<W>* taps, bool& more) {
        int count = 0;
        const auto write = [&](int pixel, W& weight) {
            if (!weight.is_zero()) taps[count++] = {(Offset)pixel * step, weight};
            weight.clear();
        };
        const Compute share = (Compute)1 / (Compute)axis.samples;
        while (next < stop && count + 2 <= MOST_TAPS) {
            const Taps at = taps_of(rule, position_of(rule, axis, origin, next), size);
            const long long i = next++;
            if (!at.inside) continue;
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
            const Compute fraction = (Compute)at.fraction, lever = lever_of(rule, bin, i, share);
            const bool two = at.high > at.low;
            if (!change.wanted) {
                low.value += (1 - fraction) * share;
                (two ? high : low).value += fraction * share;
            } else if (two) {
                const Compute slope = (change.start + lever * change.bin) * share;
                low.value -= slope;
                high.value += slope;
            }
            if (two) {
                low.slope(-share, lever);
                high.slope(share, lever);
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
    int count[MOST_TILE];
    Tap<W> taps[MOST_TILE][MOST_TAPS + 1];  // one more, so that bins lie in different banks
    TapStream<W> streams[MOST_TILE];

    // Whether the bin has more taps than were read.
    __device__ bool read(const Arguments& a, int axis, int bin) {
        bool more;
        TapStream<W> stream = streams[bin];
        count[bin] = stream.read(a.rule, (Offset)a.feature_strides[2 + axis], taps[bin], more);
        streams[bin] = stream;  // also of a bin that has no more, whose neighbours may have
        return more;
    }
};

// Calls `work(term)` with the taps of a box's bins in `along`, for y and x, and with its image in `image`, -1 for a
// broken box, which has no taps. Once in most cases; again for each further part of the taps, where there are many.
// `held`: whether `along` holds all that there is already, of an earlier call; it is set where that is so.
template <typename W, typename Work>
DEVICE void for_taps(const Arguments& a, const Task& task, TapTable<W>* along, long long& image, bool& held, Work work) {
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
        if (found >= 0) mine.axis = resolve(a.rule, edges[axis], edges[axis + 2], axis, a.size[axis]);
        mine.bin = task.first[axis] + bin;
        mine.size = a.size[axis];
    }
    bool all = term_count(a) == 1;
    for (int term = 0; term < term_count(a); ++term) {
        if (reads) mine.change = change_of(a, task.item, term, axis);
        // All parts along x for each along y.
        bool unread = false, more_x = false, more_y = false;
        do {
            if (reads_x || (reads_y && !more_x)) {
                if (reads_x ? !more_x : !more_y) mine.start();
                unread = along[axis].read(a, axis, bin);
            }
            more_x = !held && __syncthreads_or(reads_x && unread);
            work(term);
            more_y = !held && __syncthreads_or(reads_y && unread);  // also before the taps are others
            if (more_x || more_y) all = false;
        } while (more_x || more_y);
    }
    held = held || all;
}
