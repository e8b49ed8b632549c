// The gradient to the features. A block owns a tile of pixels of one image, for some channels: it looks through the boxes
// for those that touch the tile, adds what each gives, in the boxes' order, and writes each element once. So the result
// is the same, to the bit, each time, and neither atomics nor zeroed memory are needed.

const int BINS = MOST_TILE;               // of an axis in a piece
const int PIECES = THREADS / (2 * BINS);  // worked on together, one thread for each bin, or each pixel, of their two axes

// What a first kernel works out for each box, for all tiles: the pixels that it may touch, a few more on each side, and
// its axes. Every tile looks at all boxes, most of which are elsewhere.
struct Reach {
    long long image;  // -1: a broken box, or one without samples
    int first[2], last[2];
};

DEVICE Reach* reaches_of(const Arguments& a) { return (Reach*)a.workspace; }
DEVICE Axis* axes_of(const Arguments& a, long long k) { return (Axis*)(reaches_of(a) + a.count) + 2 * k; }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) resolve_boxes(const Arguments a) {
    const long long k = (a.first_block + blockIdx.x) * THREADS + threadIdx.x;
    if (k >= a.count) return;
    Reach found = {-1, {0, 0}, {0, 0}};
    Real edges[4];
    const long long image = open_box(a, k, edges);
    if (image >= 0) {
        found.image = image;
        for (int i = 0; i < 2; ++i) {
            const Axis axis = resolve(a.rule, edges[i], edges[i + 2], i, a.size[i]);
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
    reaches_of(a)[k] = found;
}

// The positions whose taps may touch a tile's pixels. Clamping brings samples from around the image to its border.
struct Band {
    int least, most;

    __device__ Band(const Task& task, int axis, int size) {
        const int start = task.first[axis], stop = start + task.extent[axis];
        least = start - 1;
        most = stop < size ? stop : size;
    }
};

// The bins of an axis that may have samples in a band. Errs on the side of more.
struct Range {
    int from, to;

    __device__ Range(const Axis& axis, int bins, const Band& band) {
        const Real u = ((Real)band.least - axis.start) / axis.bin, v = ((Real)band.most - axis.start) / axis.bin;
        const Real rounding = sizeof(Real) == 4 ? (Real)4e-6 : (Real)1e-14;
        const Real slack = 2 + rounding * (fabs(u) + fabs(v) + fabs(axis.start / axis.bin));
        const Real low = (u < v ? u : v) - slack, high = (u < v ? v : u) + slack;
        // so written that NaN takes in all of them
        from = low > 0 ? (low < bins ? (int)low : bins) : 0;
        to = high < bins ? (high > 0 ? (int)high + 1 : 0) : bins;
    }

    __device__ int parts() const { return (to - from + BINS - 1) / BINS; }
};

// Up to BINS x BINS bins of a box, in one term of a derivative.
struct Part {
    long long box;
    int term, first[2], bins[2];

    // One of all parts of a box; the number of all is that of `parts_of`.
    __device__ Part(const Arguments& a, const Band* bands, long long k, long long number) {
        box = k;
        for (int axis = 1; axis >= 0; --axis) {
            const Range range(axes_of(a, k)[axis], a.rule.bins[axis], bands[axis]);
            first[axis] = range.from + (int)(number % range.parts()) * BINS;
            bins[axis] = min(BINS, range.to - first[axis]);
            number /= range.parts();
        }
        term = (int)number;
    }
};

DEVICE long long parts_of(const Arguments& a, const Band* bands, long long k) {
    long long count = term_count(a);
    for (int axis = 0; axis < 2; ++axis) count *= Range(axes_of(a, k)[axis], a.rule.bins[axis], bands[axis]).parts();
    return count;
}

// A part's weights on the tile's pixels, along each axis.
struct Piece {
    long long box;
    int first[2], bins[2];
    Compute weight[2][BINS][MOST_TILE + 1];    // one more, so that bins lie in different banks
    int from[2][MOST_TILE], to[2][MOST_TILE];  // the bins that touch each pixel

    // One thread a bin.
    __device__ void fill(const Arguments& a, const Task& task, const Band& band, const Part& part, int axis, int bin) {
        if (axis == 0 && bin == 0) {
            box = part.box;
            for (int i = 0; i < 2; ++i) first[i] = part.first[i], bins[i] = part.bins[i];
        }
        if (bin >= part.bins[axis]) return;
        Compute* weights = weight[axis][bin];
        for (int i = 0; i < task.extent[axis]; ++i) weights[i] = 0;
        const int number = part.first[axis] + bin, start = task.first[axis], size = a.size[axis];
        const Axis along = axes_of(a, part.box)[axis];
        const Change change = change_of(a, part.box, part.term, axis);
        const Real origin = origin_of(along, number);
        const Compute share = (Compute)1 / (Compute)along.samples;
        long long i, stop;
        candidates(along, origin, band.least, band.most, i, stop);
        for (; i < stop; ++i) {
            const Taps taps = taps_of(a.rule, position_of(a.rule, along, origin, i), size);
            if (!taps.inside) continue;
            const int low = taps.low - start, high = taps.high - start;
            const Compute fraction = (Compute)taps.fraction;
            Compute at_low = (1 - fraction) * share, at_high = fraction * share;
            if (change.wanted) {
                at_high = low == high ? (Compute)0 : (change.start + lever_of(a.rule, number, i, share) * change.bin) * share;
                at_low = -at_high;
            }
            if (low >= 0 && low < task.extent[axis]) weights[low] += at_low;
            if (high >= 0 && high < task.extent[axis]) weights[high] += at_high;
        }
    }

    // One thread a pixel, after all bins are filled.
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

// Adds what a piece's bins give to one of the tile's spots.
template <typename Whole>
DEVICE void add_piece(Whole whole, const Arguments& a, const Piece& piece, const Spot& spot, Compute* total) {
    const Offset strides[] = {(Offset)a.output_strides[0], (Offset)a.output_strides[1], (Offset)a.output_strides[2],
                              (Offset)a.output_strides[3]};
    const Offset crop = (Offset)piece.box * strides[0] + (Offset)spot.channel * strides[1] +
                        (Offset)piece.first[0] * strides[2] + (Offset)piece.first[1] * strides[3];
    const int from = piece.from[1][spot.x], to = piece.to[1][spot.x];
    if (from == to) return;
    for (int i = piece.from[0][spot.y]; i < piece.to[0][spot.y]; ++i) {
        const Compute along_y = piece.weight[0][i][spot.y];
        if (along_y == 0) continue;  // 0 times NaN is not 0
        Compute sum[LANES] = {};
        UNROLL_READS for (int j = from; j < to; ++j) {
            const Compute along_x = piece.weight[1][j][spot.x];
            Compute grads[LANES];
            read_lanes<Grad>(whole, a.grad_output, crop + (Offset)i * strides[2] + (Offset)j * strides[3], strides[1],
                             spot.lanes, grads);
            if (along_x != 0)
                UNROLL for (int l = 0; l < LANES; ++l) sum[l] += along_x * grads[l];
        }
        UNROLL for (int l = 0; l < LANES; ++l) total[l] += along_y * sum[l];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) feature_gradient(const Arguments a) {
    __shared__ Piece pieces[PIECES];
    __shared__ long long ends[2][THREADS];  // of each box's parts, among those of THREADS boxes
    const Task task(a, a.size);
    const Band bands[2] = {Band(task, 0, a.size[0]), Band(task, 1, a.size[1])};
    const int thread = threadIdx.x, own = thread / (2 * BINS), axis = thread / BINS % 2, bin = thread % BINS;
    Compute total[SPOTS][LANES];
    UNROLL for (int m = 0; m < SPOTS; ++m)
        UNROLL for (int l = 0; l < LANES; ++l) total[m][l] = 0;

    for (long long base = 0; base < a.count; base += THREADS) {
        // Which of the next boxes touch the tile, and in how many parts.
        long long count = 0;
        if (base + thread < a.count) {
            const Reach reach = reaches_of(a)[base + thread];
            if (reach.image == task.item && reach.last[0] >= bands[0].least && reach.first[0] <= bands[0].most &&
                reach.last[1] >= bands[1].least && reach.first[1] <= bands[1].most)
                count = parts_of(a, bands, base + thread);
        }
        if (!__syncthreads_or(count > 0)) continue;
        int now = 0;
        ends[0][thread] = count;
        for (int step = 1; step < THREADS; step *= 2) {
            __syncthreads();
            ends[1 - now][thread] = ends[now][thread] + (thread >= step ? ends[now][thread - step] : 0);
            now = 1 - now;
        }
        __syncthreads();
        const long long all = ends[now][THREADS - 1];

        for (long long done = 0; done < all; done += PIECES) {
            const int count_now = (int)min((long long)PIECES, all - done);
            if (own < count_now) {
                int before = 0;  // boxes whose parts end before this one
                for (int half = THREADS / 2; half > 0; half /= 2)
                    if (ends[now][before + half - 1] <= done + own) before += half;
                const long long number = done + own - (before > 0 ? ends[now][before - 1] : 0);
                pieces[own].fill(a, task, bands[axis], Part(a, bands, base + before, number), axis, bin);
            }
            __syncthreads();
            if (own < count_now && bin < task.extent[axis]) pieces[own].find(axis, bin);
            __syncthreads();
            UNROLL for (int m = 0; m < SPOTS; ++m) {
                const Spot spot(task, thread + m * THREADS);
                if (spot.lanes == 0) continue;
                by_lanes(spot.lanes, a.packed_crops, [&](auto whole) {
                    for (int n = 0; n < count_now; ++n) add_piece(whole, a, pieces[n], spot, total[m]);
                });
            }
            __syncthreads();  // before the pieces are others
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
