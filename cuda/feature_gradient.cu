// The gradient with respect to the features. A block owns a tile of pixels of one image, for some channels: it finds the
// boxes that touch the tile, adds up what each contributes, in the order of the boxes, and writes each element once. So
// results are bitwise reproducible, and neither atomics nor zeroed memory are needed.

const int BINS = 16;    // along each axis of a chunk
const int CHUNKS = 24;  // processed together at most
const int WIDEST_CHUNKS = 48 / sizeof(Compute);  // where tiles are as wide as can be
const int WARP = 32;

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

static_assert(sizeof(Bounds) + 2 * sizeof(Axis) == BOX_BYTES, "Types.box_bytes in gpu/kernels.py says the same");
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

// A first kernel finds each box's bounds and axes, for all tiles, and marks the zones that it touches. A block does so for
// a word of boxes: a thread for each box, and then for each row of marks.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) resolve_boxes(const Arguments a) {
    __shared__ Bounds bounds[WORD];
    __shared__ int images[WORD];  // the zones of the boxes' images; -1: without samples
    const long long word = a.first_block + blockIdx.x, k = word * WORD + threadIdx.x;
    if (threadIdx.x < WORD) {
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
        images[threadIdx.x] = found.image < 0 ? -1 : (int)(found.image % a.zones[2]);
    }
    __syncthreads();
    const int rows = a.zones[0] + a.zones[1] + a.zones[2];
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        int kind = 0, zone = row;
        while (kind < 2 && zone >= a.zones[kind]) zone -= a.zones[kind++];
        Interval pixels = {0, 0};
        if (kind < 2) {
            const int start = zone * a.zone_pixels[kind], size = a.size[kind];
            pixels = interval_of(start, start + min(a.zone_pixels[kind], size - start), size);
        }
        unsigned marks = 0;
        for (int i = 0; i < WORD; ++i) {
            const bool touched = kind == 2 ? images[i] == zone : images[i] >= 0 && bounds[i].touch(kind, pixels);
            marks |= (unsigned)touched << i;
        }
        marks_of(a, row)[word] = marks;
    }
}

// The bins of an axis that may have samples in an interval. Errs on the side of more.
struct Range {
    int from, to;

    __device__ Range(const Axis& axis, int bins, const Interval& interval) {
        const Real u = ((Real)interval.least - axis.start) / axis.step, v = ((Real)interval.most - axis.start) / axis.step;
        const Real rounding = sizeof(Real) == 4 ? (Real)4e-6 : (Real)1e-14;
        const Real slack = (Real)0.01 + rounding * (fabs(u) + fabs(v) + fabs(axis.start / axis.step));
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

// The weights of chunks on the tile's pixels, along each axis.
struct ChunkWeights {
    struct Bins { unsigned char from, to; };

    Offset first[CHUNKS];  // of a chunk's first bin in channel 0, among the crops
    int bins[CHUNKS][2];
    Bins touching[CHUNKS][2][MOST_PIXELS];  // a pixel
    int width;                              // `width_of`
    Compute weights[WIDEST_CHUNKS * 2 * BINS * (MOST_PIXELS + 1)];

    // From a bin's weights to the next one's: odd, so that bins lie in different banks.
    static __device__ int width_of(const Arguments& a) { return max(a.tile[0], a.tile[1]) | 1; }

    // How many chunks there is room for: more where tiles are small.
    __device__ int room(const Arguments& a) const {
        return min(CHUNKS, (int)(sizeof weights / sizeof(Compute)) / (2 * BINS * width_of(a)));
    }

    __device__ Compute* of(int chunk, int axis, int bin) { return weights + ((2 * chunk + axis) * BINS + bin) * width; }

    // One thread per bin.
    __device__ void fill(const Arguments& a, const Task& task, const Interval& tile, int to, const Chunk& chunk, int axis,
                         int bin) {
        if (axis == 0 && bin == 0)
            first[to] = (Offset)chunk.box * (Offset)a.output_strides[0] + (Offset)chunk.first[0] * (Offset)a.output_strides[2] +
                        (Offset)chunk.first[1] * (Offset)a.output_strides[3];
        if (bin == 0) bins[to][axis] = chunk.bins[axis];
        if (bin >= chunk.bins[axis]) return;
        Compute* here = of(to, axis, bin);
        for (int i = 0; i < task.extent[axis]; ++i) here[i] = 0;
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
            if (low >= 0 && low < task.extent[axis]) here[low] += at_low;
            if (high >= 0 && high < task.extent[axis]) here[high] += at_high;
        }
    }

    // One thread per pixel, after all bins are filled.
    __device__ void find(int chunk, int axis, int pixel) {
        const Compute* weight = of(chunk, axis, 0) + pixel;
        Bins found = {0, 0};
        for (int p = 0; p < bins[chunk][axis]; ++p, weight += width)
            if (*weight != 0) {
                if (found.to == 0) found.from = p;
                found.to = p + 1;
            }
        touching[chunk][axis][pixel] = found;
    }

    // Adds what a chunk's bins contribute to one of the tile's spots.
    template <typename Whole>
    __device__ void add(Whole whole, const Arguments& a, int chunk, const Spot& spot, Compute* total) {
        const Bins y = touching[chunk][0][spot.y], x = touching[chunk][1][spot.x];
        if (y.from == y.to || x.from == x.to) return;
        const Offset step_y = (Offset)a.output_strides[2], step_x = (Offset)a.output_strides[3];
        const Offset channel = first[chunk] + (Offset)spot.channel * (Offset)a.output_strides[1];
        const Compute* weights_y = of(chunk, 0, y.from) + spot.y;
        const Compute* first_x = of(chunk, 1, x.from) + spot.x;
        for (int i = y.from; i < y.to; ++i, weights_y += width) {
            const Compute along_y = *weights_y;
            if (along_y == 0) continue;  // 0 times NaN is not 0
            Compute sum[LANES] = {};
            const Compute* weights_x = first_x;
            // Few bins touch a pixel: a loop for several at a time takes an eighth longer on an H200.
            NO_UNROLL for (int j = x.from; j < x.to; ++j, weights_x += width) {
                const Compute along_x = *weights_x;
                Compute grads[LANES];
                read_lanes<Grad>(whole, a.grad_output, channel + (Offset)i * step_y + (Offset)j * step_x,
                                 (Offset)a.output_strides[1], spot.lanes, grads);
                if (along_x != 0)
                    UNROLL for (int l = 0; l < LANES; ++l) sum[l] += along_x * grads[l];
            }
            UNROLL for (int l = 0; l < LANES; ++l) total[l] += along_y * sum[l];
        }
    }
};

// Adds `value` up over a block's threads: sums[i] is the sum of those of threads 0 to i. `of_warps`: memory for the sums
// of warps.
DEVICE void add_along(long long* sums, long long* of_warps, long long value) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    UNROLL for (int distance = 1; distance < WARP; distance *= 2) {
        const long long before = __shfl_up_sync(~0u, value, distance);
        if (lane >= distance) value += before;
    }
    if (lane == WARP - 1) of_warps[warp] = value;
    __syncthreads();  // also before the sums of an earlier call are overwritten
    NO_UNROLL for (int i = 0; i < warp; ++i) value += of_warps[i];
    sums[threadIdx.x] = value;
    __syncthreads();
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

// Where a search is: in the words from `word` on, whose `marked` boxes are candidates; among them in the THREADS from `base`
// on, which have so many chunks; and so many of these are done.
struct Cursor {
    long long word, chunks, done;
    int base, marked;
};

// Finds the chunks of boxes that touch a tile, in the boxes' order, as many at a time as there is room for.
struct Search {
    Interval tile[2];
    Cursor cursor;  // here and not in registers, which the sums of gradients need
    ChunkWeights chunks;
    long long sums[THREADS], of_warps[THREADS / WARP];
    unsigned words[THREADS];
    unsigned short marked[THREADS], boxes[THREADS];  // how many in the words up to each; the numbers of candidates in them
};

// Sets `search.chunks` to the next ones; returns how many, and 0 at the end.
DEVICE int next_chunks(const Arguments& a, const Task& task, Search& search) {
    Cursor at = search.cursor;
    const int thread = threadIdx.x, room = search.chunks.room(a);
    while (at.done == at.chunks) {
        if (at.base + THREADS < at.marked) {
            // Which of the next THREADS candidates touch the tile, and by how many chunks.
            at.base += THREADS;
            long long count = 0, beyond;
            if (at.base + thread < at.marked) {
                const int word = owner_of(search.marked, at.base + thread, beyond);
                unsigned left = search.words[word];
                for (; beyond > 0; --beyond) left &= left - 1;  // without the lowest bit
                search.boxes[thread] = (unsigned short)(word * WORD + __ffs(left) - 1);
                const long long k = at.word * WORD + search.boxes[thread];
                const Bounds bounds = bounds_of(a)[k];
                if (bounds.image == task.item && bounds.touch(0, search.tile[0]) && bounds.touch(1, search.tile[1]))
                    count = chunks_of(a, search.tile, k);
            }
            add_along(search.sums, search.of_warps, count);
            at.chunks = search.sums[THREADS - 1];
            at.done = 0;
            continue;
        }
        // Which of the next THREADS * WORD boxes may touch it.
        at.word += THREADS;
        if (at.word >= words_of(a)) return 0;
        unsigned word = 0;
        if (at.word + thread < words_of(a)) {
            const int zones[3] = {task.first[0] / a.zone_pixels[0], task.first[1] / a.zone_pixels[1],
                                  (int)(task.item % a.zones[2])};
            word = ~0u;
            for (int kind = 0; kind < 3; ++kind) word &= marks_of(a, zone_row(a, kind, zones[kind]))[at.word + thread];
        }
        at.marked = 0;
        if (!__syncthreads_or(word != 0)) continue;
        search.words[thread] = word;
        add_along(search.sums, search.of_warps, __popc(word));
        search.marked[thread] = (unsigned short)search.sums[thread];
        at.marked = (int)search.sums[THREADS - 1];
        at.base = -THREADS;
        __syncthreads();
    }
    const int count = (int)min((long long)room, at.chunks - at.done);
    __syncthreads();  // before the chunks are overwritten
    for (int i = thread; i < count * 2 * BINS; i += THREADS) {
        const int to = i / (2 * BINS), axis = i / BINS % 2;
        long long number;
        const int owner = owner_of(search.sums, at.done + to, number);
        const Chunk chunk(a, search.tile, at.word * WORD + search.boxes[owner], number);
        search.chunks.fill(a, task, search.tile[axis], to, chunk, axis, i % BINS);
    }
    __syncthreads();
    for (int i = thread; i < count * 2 * MOST_PIXELS; i += THREADS) {
        const int axis = i / MOST_PIXELS % 2, pixel = i % MOST_PIXELS;
        if (pixel < task.extent[axis]) search.chunks.find(i / (2 * MOST_PIXELS), axis, pixel);
    }
    at.done += count;
    if (thread == 0) search.cursor = at;
    __syncthreads();
    return count;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) feature_gradient(const Arguments a) {
    __shared__ Task task;
    __shared__ Search search;
    task.find(a, false, a.size);
    if (threadIdx.x == 0) search.chunks.width = ChunkWeights::width_of(a);
    if (threadIdx.x < 2) {
        const int start = task.first[threadIdx.x];
        search.tile[threadIdx.x] = interval_of(start, start + task.extent[threadIdx.x], a.size[threadIdx.x]);
    }
    int held = -1;  // how many chunks the tile has, if all lie in `search.chunks` from the round before
    for (int first = 0; first < task.spots(); first += THREADS) {
        Compute total[LANES] = {};
        __syncthreads();  // before the cursor is set back
        if (threadIdx.x == 0) search.cursor = {-THREADS, 0, 0, 0, 0};
        __syncthreads();
        int batches = 0, all = 0;
        for (bool more = true; more;) {
            const int count = held >= 0 ? held : next_chunks(a, task, search);
            const Spot spot(task, first + threadIdx.x, true);
            if (spot.lanes > 0)
                by_lanes(spot.lanes, a.packed_crops, [&](auto whole) {
                    for (int n = 0; n < count; ++n) search.chunks.add(whole, a, n, spot, total);
                });
            more = held < 0 && count > 0;
            batches += more;
            all += count;
        }
        if (batches <= 1) held = all;
        const Spot spot(task, first + threadIdx.x, true);
        if (spot.lanes <= 0) continue;
        write_lanes(a.result,
            (Offset)task.item * (Offset)a.feature_strides[0] + (Offset)spot.channel * (Offset)a.feature_strides[1] +
                (Offset)(task.first[0] + spot.y) * (Offset)a.feature_strides[2] +
                (Offset)(task.first[1] + spot.x) * (Offset)a.feature_strides[3],
            (Offset)a.feature_strides[1], spot.lanes, a.packed_features, total);
    }
}
