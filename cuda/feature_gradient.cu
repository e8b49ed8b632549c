// The gradient with respect to the features. A block owns a tile of pixels of one image, for some channels: it finds the
// boxes that touch the tile, adds up what each contributes, in the order of the boxes, and writes each element once. So
// results are bitwise reproducible, and neither atomics nor zeroed memory are needed.

const int BINS = MOST_TILE;               // along each axis of a chunk
const int CHUNKS = THREADS / (2 * BINS);  // processed together, one thread for each bin, or pixel, of their two axes
const int WORD = 32;                      // boxes per word of marks

// The positions whose taps may touch the pixels [start, stop) of an axis. Clamping brings samples from up to one pixel
// outside to the border.
struct Interval {
    int least, most;
};

DEVICE Interval interval_of(int start, int stop, int size) { return {start - 1, min(stop, size)}; }

// The pixels that a box may touch, and a few more on each side.
struct Bounds {
    long long image;  // -1: a broken box, or one without samples
    int first[2], last[2];

    __device__ bool touch(int axis, const Interval& interval) const {
        return last[axis] >= interval.least && first[axis] <= interval.most;
    }
};

// ---- the workspace: of each box Bounds and two Axis, then the marks ----

static_assert(sizeof(Bounds) + 2 * sizeof(Axis) == BOX_BYTES, "gpu/tiling.py allocates as much per box");
static_assert(sizeof(Bounds) % alignof(Axis) == 0 && BOX_BYTES % sizeof(unsigned) == 0, "all is aligned");

DEVICE Bounds* bounds_of(const Arguments& a) { return (Bounds*)a.workspace; }
DEVICE Axis* axes_of(const Arguments& a, long long k) { return (Axis*)(bounds_of(a) + a.count) + 2 * k; }

// Marks say which boxes may touch which tiles, one bit per box. An image's rows of tiles are divided into zones of
// neighbours, and so are its columns of tiles; the images are divided by their numbers' remainders. Each zone has a row
// of marks, and a tile's candidates have a mark in each of its three zones. So a tile reads three bits per box, and
// looks at few boxes beyond those that touch it.
DEVICE long long words_of(const Arguments& a) { return (a.count + WORD - 1) / WORD; }
DEVICE unsigned* marks_of(const Arguments& a, long long row) { return (unsigned*)axes_of(a, a.count) + row * words_of(a); }

// The row of marks of a zone.
DEVICE int zone_row(const Arguments& a, int kind, int zone) {
    return zone + (kind > 0 ? a.zones[0] : 0) + (kind > 1 ? a.zones[1] : 0);
}

DEVICE bool touches_zone(const Arguments& a, const Bounds& bounds, int row) {
    if (bounds.image < 0) return false;
    for (int axis = 0; axis < 2; ++axis) {
        if (row < a.zones[axis]) {
            const int start = row * a.zone_pixels[axis], size = a.size[axis];
            return bounds.touch(axis, interval_of(start, start + min(a.zone_pixels[axis], size - start), size));
        }
        row -= a.zones[axis];
    }
    return bounds.image % a.zones[2] == row;
}

// A first kernel finds each box's bounds and axes, for all tiles, and marks the zones that it touches.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) resolve_boxes(const Arguments a) {
    __shared__ Bounds bounds[THREADS];
    const long long base = (a.first_block + blockIdx.x) * THREADS, k = base + threadIdx.x;
    Bounds found = {-1, {0, 0}, {0, 0}};
    Real edges[4];
    const long long image = k < a.count ? open_box(a, k, edges) : -1;
    if (image >= 0) {
        found.image = image;
        for (int i = 0; i < 2; ++i) {
            const Axis axis = affine(a.rule, edges[i], edges[i + 2], a.rule.bins[i], a.size[i]);
            const double u = widen(origin_of(axis, 0)), v = widen(origin_of(axis, a.rule.bins[i]));
            const double slack = 1 + 1e-5 * (fabs(u) + fabs(v)), size = a.size[i];
            const double low = (u < v ? u : v) - slack, high = (u < v ? v : u) + slack;
            // so written that NaN reaches everywhere
            found.first[i] = low >= -2 ? (low <= size + 1 ? (int)floor(low) : a.size[i] + 1) : -2;
            found.last[i] = high <= size + 1 ? (high >= -2 ? (int)ceil(high) : -2) : a.size[i] + 1;
            if (axis.samples == 0) found.image = -1;
            axes_of(a, k)[i] = axis;
        }
    }
    if (k < a.count) bounds_of(a)[k] = found;
    bounds[threadIdx.x] = found;
    __syncthreads();
    const int words = THREADS / WORD, rows = a.zones[0] + a.zones[1] + a.zones[2];
    for (int number = threadIdx.x; number < rows * words; number += THREADS) {
        const int row = number / words, word = number % words;
        if (base / WORD + word >= words_of(a)) continue;
        unsigned marks = 0;
        for (int i = 0; i < WORD; ++i)
            if (touches_zone(a, bounds[word * WORD + i], row)) marks |= 1u << i;
        marks_of(a, row)[base / WORD + word] = marks;
    }
}

// The bins of an axis that may have samples in an interval. Errs on the side of more.
struct Range {
    int from, to;

    __device__ Range(const Axis& axis, int bins, const Interval& interval) {
        const Real u = ((Real)interval.least - axis.start) / axis.step, v = ((Real)interval.most - axis.start) / axis.step;
        const Real rounding = sizeof(Real) == 4 ? (Real)4e-6 : (Real)1e-14;
        const Real slack = 2 + rounding * (fabs(u) + fabs(v) + fabs(axis.start / axis.step));
        const Real low = (u < v ? u : v) - slack, high = (u < v ? v : u) + slack;
        // so written that NaN takes in all of them
        from = low > 0 ? (low < bins ? (int)low : bins) : 0;
        to = high < bins ? (high > 0 ? (int)high + 1 : 0) : bins;
    }

    __device__ int chunks() const { return (to - from + BINS - 1) / BINS; }
};

// Up to BINS x BINS bins of a box, in one term of a derivative.
struct Chunk {
    long long box;
    int term, first[2], bins[2];

    // One of those that `chunks_of` counts.
    __device__ Chunk(const Arguments& a, const Interval* tile, long long k, long long number) {
        box = k;
        for (int axis = 1; axis >= 0; --axis) {
            const Range range(axes_of(a, k)[axis], a.rule.bins[axis], tile[axis]);
            first[axis] = range.from + (int)(number % range.chunks()) * BINS;
            bins[axis] = min(BINS, range.to - first[axis]);
            number /= range.chunks();
        }
        term = (int)number;
    }
};

DEVICE long long chunks_of(const Arguments& a, const Interval* tile, long long k) {
    long long count = term_count(a);
    for (int axis = 0; axis < 2; ++axis) count *= Range(axes_of(a, k)[axis], a.rule.bins[axis], tile[axis]).chunks();
    return count;
}

// A chunk's weights on the tile's pixels, along each axis.
struct ChunkWeights {
    long long box;
    int first[2], bins[2];
    Compute weight[2][BINS][MOST_TILE + 1];    // one more, so that bins lie in different banks
    int from[2][MOST_TILE], to[2][MOST_TILE];  // the bins that touch each pixel

    // One thread per bin.
    __device__ void fill(const Arguments& a, const Task& task, const Interval& tile, const Chunk& chunk, int axis, int bin) {
        if (axis == 0 && bin == 0) {
            box = chunk.box;
            for (int i = 0; i < 2; ++i) first[i] = chunk.first[i], bins[i] = chunk.bins[i];
        }
        if (bin >= chunk.bins[axis]) return;
        Compute* weights = weight[axis][bin];
        for (int i = 0; i < task.extent[axis]; ++i) weights[i] = 0;
        const int number = chunk.first[axis] + bin, start = task.first[axis], size = a.size[axis];
        const Axis along = axes_of(a, chunk.box)[axis];
        const Change change = change_of(a, chunk.box, chunk.term, axis);
        const Real origin = origin_of(along, number);
        const Compute each = (Compute)1 / (Compute)along.samples;
        long long i, stop;
        candidates(along, origin, tile.least, tile.most, i, stop);
        for (; i < stop; ++i) {
            const Real position = position_of(a.rule, along, origin, i);
            if (!is_inside(a.rule, position, size)) continue;
            const Taps taps = taps_of(a.rule, position, size);
            const int low = taps.low - start, high = taps.high - start;
            const Compute fraction = (Compute)taps.fraction;
            Compute at_low = (1 - fraction) * each, at_high = fraction * each;
            if (change.wanted) {
                at_high = low == high ? (Compute)0 : (change.start + lever_of(a.rule, number, i, each) * change.step) * each;
                at_low = -at_high;
            }
            if (low >= 0 && low < task.extent[axis]) weights[low] += at_low;
            if (high >= 0 && high < task.extent[axis]) weights[high] += at_high;
        }
    }

    // One thread per pixel, after all bins are filled.
    __device__ void find(int axis, int pixel) {
        int first_bin = 0, end = 0;
        for (int p = 0; p < bins[axis]; ++p)
            if (weight[axis][p][pixel] != 0) {
                if (end == 0) first_bin = p;
                end = p + 1;
            }
        from[axis][pixel] = first_bin;
        to[axis][pixel] = end;
    }
};

// Adds what a chunk's bins contribute to one of the tile's spots.
template <typename Whole>
DEVICE void add_chunk(Whole whole, const Arguments& a, const ChunkWeights& chunk, const Spot& spot, Compute* total) {
    const Offset strides[] = {(Offset)a.output_strides[0], (Offset)a.output_strides[1], (Offset)a.output_strides[2],
                              (Offset)a.output_strides[3]};
    const Offset crop = (Offset)chunk.box * strides[0] + (Offset)spot.channel * strides[1] +
                        (Offset)chunk.first[0] * strides[2] + (Offset)chunk.first[1] * strides[3];
    const int from = chunk.from[1][spot.x], to = chunk.to[1][spot.x];
    if (from == to) return;
    for (int i = chunk.from[0][spot.y]; i < chunk.to[0][spot.y]; ++i) {
        const Compute along_y = chunk.weight[0][i][spot.y];
        if (along_y == 0) continue;  // 0 times NaN is not 0
        Compute sum[LANES] = {};
        UNROLL_READS for (int j = from; j < to; ++j) {
            const Compute along_x = chunk.weight[1][j][spot.x];
            Compute grads[LANES];
            read_lanes<Grad>(whole, a.grad_output, crop + (Offset)i * strides[2] + (Offset)j * strides[3], strides[1],
                             spot.lanes, grads);
            if (along_x != 0)
                UNROLL for (int l = 0; l < LANES; ++l) sum[l] += along_x * grads[l];
        }
        UNROLL for (int l = 0; l < LANES; ++l) total[l] += along_y * sum[l];
    }
}

// Adds `value` up over a block's threads: sums[result][i] is the sum of those of threads 0 to i.
DEVICE int add_along(long long (*sums)[THREADS], long long value) {
    const int thread = threadIdx.x;
    int now = 0;
    __syncthreads();  // before the sums of an earlier call are overwritten
    sums[0][thread] = value;
    UNROLL for (int step = 1; step < THREADS; step *= 2) {
        __syncthreads();
        sums[1 - now][thread] = sums[now][thread] + (thread >= step ? sums[now][thread - step] : 0);
        now = 1 - now;
    }
    __syncthreads();
    return now;
}

// The first thread whose sum is larger than `number`, and by how much `number` is beyond the sum of those before it.
template <typename Sum>
DEVICE int owner_of(const Sum* sums, long long number, long long& beyond) {
    int before = 0;
    for (int half = THREADS / 2; half > 0; half /= 2)
        if (sums[before + half - 1] <= number) before += half;
    beyond = number - (before > 0 ? sums[before - 1] : 0);
    return before;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) feature_gradient(const Arguments a) {
    __shared__ Task task;
    __shared__ Interval tile[2];
    __shared__ ChunkWeights chunks[CHUNKS];
    __shared__ long long sums[2][THREADS], boxes[THREADS];
    __shared__ unsigned words[THREADS];
    __shared__ unsigned short marked[THREADS];  // in the words up to each
    const int thread = threadIdx.x, own = thread / (2 * BINS), axis = thread / BINS % 2, bin = thread % BINS;
    task.find(a, a.size);
    if (thread < 2) tile[thread] = interval_of(task.first[thread], task.first[thread] + task.extent[thread], a.size[thread]);
    Compute total[SPOTS][LANES];
    UNROLL for (int m = 0; m < SPOTS; ++m)
        UNROLL for (int l = 0; l < LANES; ++l) total[m][l] = 0;

    for (long long first_word = 0; first_word < words_of(a); first_word += THREADS) {
        // Which of the next THREADS * WORD boxes may touch the tile.
        unsigned word = 0;
        if (first_word + thread < words_of(a)) {
            const int zones[3] = {task.first[0] / a.zone_pixels[0], task.first[1] / a.zone_pixels[1],
                                  (int)(task.item % a.zones[2])};
            word = ~0u;
            for (int kind = 0; kind < 3; ++kind) word &= marks_of(a, zone_row(a, kind, zones[kind]))[first_word + thread];
        }
        if (!__syncthreads_or(word != 0)) continue;
        words[thread] = word;
        int now = add_along(sums, __popc(word));
        marked[thread] = (unsigned short)sums[now][thread];
        __syncthreads();

        for (int base = 0; base < marked[THREADS - 1]; base += THREADS) {
            // Which of the next THREADS candidates touch it, and by how many chunks.
            long long count = 0, all_before;
            if (base + thread < marked[THREADS - 1]) {
                const int at = owner_of(marked, base + thread, all_before);
                unsigned left = words[at];
                for (; all_before > 0; --all_before) left &= left - 1;  // without the lowest bit
                const long long k = boxes[thread] = (first_word + at) * WORD + __ffs(left) - 1;
                const Bounds bounds = bounds_of(a)[k];
                if (bounds.image == task.item && bounds.touch(0, tile[0]) && bounds.touch(1, tile[1]))
                    count = chunks_of(a, tile, k);
            }
            now = add_along(sums, count);

            for (long long done = 0; done < sums[now][THREADS - 1]; done += CHUNKS) {
                const int count_now = (int)min((long long)CHUNKS, sums[now][THREADS - 1] - done);
                if (own < count_now) {
                    long long number;
                    const int at = owner_of(sums[now], done + own, number);
                    chunks[own].fill(a, task, tile[axis], Chunk(a, tile, boxes[at], number), axis, bin);
                }
                __syncthreads();
                if (own < count_now && bin < task.extent[axis]) chunks[own].find(axis, bin);
                __syncthreads();
                UNROLL for (int m = 0; m < SPOTS; ++m) {
                    const Spot spot(task, thread + m * THREADS);
                    if (spot.lanes == 0) continue;
                    by_lanes(spot.lanes, a.packed_crops, [&](auto whole) {
                        for (int n = 0; n < count_now; ++n) add_chunk(whole, a, chunks[n], spot, total[m]);
                    });
                }
                __syncthreads();  // before the chunks are overwritten
            }
        }
    }
    UNROLL for (int m = 0; m < SPOTS; ++m) {
        const Spot spot(task, thread + m * THREADS);
        if (spot.lanes == 0) continue;
        write_lanes(a.result,
            (Offset)task.item * (Offset)a.feature_strides[0] + (Offset)spot.channel * (Offset)a.feature_strides[1] +
                (Offset)(task.first[0] + spot.y) * (Offset)a.feature_strides[2] +
                (Offset)(task.first[1] + spot.x) * (Offset)a.feature_strides[3],
            (Offset)a.feature_strides[1], spot.lanes, a.packed_features, total[m]);
    }
}
