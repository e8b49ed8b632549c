// The gradient to the features, after `reach`. A block owns a tile of pixels of one image, for some channels: it looks through the
// boxes for those that touch the tile, adds what each gives, in the boxes' order, and writes each element once.
// So the result is the same, to the bit, each time, and neither atomics nor zeroed memory are needed.

const int THREADS = 256;
const int OUTPUTS = 8;   // of a thread
const int PIXELS = 8;    // a side of the tile
const int BINS = 32;     // of an axis that are worked on together

// Weights of some bins on the tile's pixels along one axis, and which bins touch each of these.
struct Band {
    Compute weight[BINS][PIXELS];
    int first[PIXELS], stop[PIXELS];

    // One thread a bin: its samples that touch the tile.
    __device__ void fill(const Rule& rule, const Axis& axis, const Change& change, int bin, int place, int size, int start) {
        for (int i = 0; i < PIXELS; ++i) weight[place][i] = 0;
        const Real origin = origin_of(axis, bin);
        const Compute share = (Compute)1 / (Compute)axis.samples;
        long long i, stop_sample;
        // Clamping brings samples from the band around the image to its border.
        candidates(axis, origin, start == 0 ? -1 : start - 1, start + PIXELS >= size ? size : start + PIXELS, i, stop_sample);
        for (; i < stop_sample; ++i) {
            const Taps taps = taps_of(rule, position_of(rule, axis, origin, i), size);
            if (!taps.inside) continue;
            const int low = taps.low - start, high = taps.high - start;
            const Compute fraction = (Compute)taps.fraction;
            Compute at_low = (1 - fraction) * share, at_high = fraction * share;
            if (change.wanted) {
                at_high = low == high ? (Compute)0 : (change.start + lever_of(rule, bin, i, share) * change.bin) * share;
                at_low = -at_high;
            }
            if (low >= 0 && low < PIXELS) weight[place][low] += at_low;
            if (high >= 0 && high < PIXELS) weight[place][high] += at_high;
        }
    }

    // One thread a pixel, after all bins are filled. Returns whether any bin touches it.
    __device__ bool range(int pixel, int bins) {
        int from = bins, to = 0;
        for (int p = 0; p < bins; ++p)
            if (weight[p][pixel] != 0) {
                if (from == bins) from = p;
                to = p + 1;
            }
        first[pixel] = from;
        stop[pixel] = to;
        return from < to;
    }
};

// Whether bins [from, to) may have a sample that touches pixels [start, start + PIXELS). Errs on the side of yes.
DEVICE bool near(const Axis& axis, int from, int to, int size, int start) {
    if (axis.samples == 0) return false;
    const double a = widen(origin_of(axis, from)), b = widen(origin_of(axis, to));
    const double low = a < b ? a : b, high = a < b ? b : a;
    const double slack = 1 + 1e-5 * (fabs(a) + fabs(b));
    const double least = start == 0 ? -1 : start - 1, most = start + PIXELS >= size ? size : start + PIXELS;
    return !(high + slack < least || low - slack > most);  // so written that NaN is near
}

// The pixels that a box may touch, a few more on each side. Every tile looks at all boxes, and would spend most of its
// time on resolving those that are elsewhere.
struct Reach {
    long long image;  // -1: a broken box
    int first[2], last[2];
};

// Whether a box may touch pixels [start, start + PIXELS). Clamping brings samples from around the image to its border.
DEVICE bool meets(const Reach& reach, int axis, int size, int start) {
    const int least = start == 0 ? -1 : start - 1, most = start + PIXELS >= size ? size : start + PIXELS;
    return reach.last[axis] >= least && reach.first[axis] <= most;
}

extern "C" __global__ void __launch_bounds__(THREADS) reach(const Arguments a) {
    const long long k = (a.first_block + blockIdx.x) * THREADS + threadIdx.x;
    if (k >= a.count) return;
    Reach found = {-1, {0, 0}, {0, 0}};
    Axis axes[2];
    long long image;
    if (open_box(a, k, image, axes) && axes[0].samples > 0 && axes[1].samples > 0) {
        found.image = image;
        for (int axis = 0; axis < 2; ++axis) {
            const double u = widen(origin_of(axes[axis], 0)), v = widen(origin_of(axes[axis], a.rule.bins[axis]));
            const double slack = 1 + 1e-5 * (fabs(u) + fabs(v)), size = a.size[axis];
            const double low = (u < v ? u : v) - slack, high = (u < v ? v : u) + slack;
            // so written that NaN reaches everywhere
            found.first[axis] = low >= -2 ? (low <= size + 1 ? (int)floor(low) : a.size[axis] + 1) : -2;
            found.last[axis] = high <= size + 1 ? (high >= -2 ? (int)ceil(high) : -2) : a.size[axis] + 1;
        }
    }
    ((Reach*)a.result)[k] = found;
}

extern "C" __global__ void __launch_bounds__(THREADS) feature_gradient(const Arguments a) {
    __shared__ Band along_y, along_x;
    __shared__ int found[THREADS];
    __shared__ int counts[THREADS / 32];
    __shared__ bool touching[THREADS];
    const Task task = task_of(a, (a.size[0] + PIXELS - 1) / PIXELS, (a.size[1] + PIXELS - 1) / PIXELS);
    const long long n = task.item;
    const int thread = threadIdx.x, first_channel = task.first_channel;
    const int start[2] = {task.tile_y * PIXELS, task.tile_x * PIXELS};
    const int channels = min(a.channels_at_once, a.channels - first_channel);
    const int rows = min(PIXELS, a.size[0] - start[0]), columns = min(PIXELS, a.size[1] - start[1]);
    const int outputs = channels * rows * columns;
    Compute total[OUTPUTS];
    for (int m = 0; m < OUTPUTS; ++m) total[m] = 0;

    for (long long base = 0; base < a.count; base += THREADS) {
        // Which of the next boxes touch the tile, in their order.
        bool touches = false;
        if (base + thread < a.count) {
            const Reach found = ((const Reach*)a.workspace)[base + thread];
            touches = found.image == n && meets(found, 0, a.size[0], start[0]) && meets(found, 1, a.size[1], start[1]);
        }
        touching[thread] = touches;
        if (!__syncthreads_or(touches)) continue;
        if (thread < THREADS / 32) {
            int count = 0;
            for (int i = 0; i < 32; ++i) count += touching[thread * 32 + i];
            counts[thread] = count;
        }
        __syncthreads();
        int boxes = 0;
        for (int i = 0; i < THREADS / 32; ++i) {
            if (i == thread) {
                int place = boxes;
                for (int j = 0; j < 32; ++j)
                    if (touching[thread * 32 + j]) found[place++] = thread * 32 + j;
            }
            boxes += counts[i];
        }
        __syncthreads();

        for (int f = 0; f < boxes; ++f) {
            const long long k = base + found[f];
            long long image;
            Axis axes[2];
            open_box(a, k, image, axes);
            for (int term = 0; term < term_count(a); ++term) {
                const Change change_y = change_of(a, k, axes, term, 0), change_x = change_of(a, k, axes, term, 1);
                for (int p = 0; p < a.rule.bins[0]; p += BINS) {
                    const int bins_y = min(BINS, a.rule.bins[0] - p);
                    if (!near(axes[0], p, p + bins_y, a.size[0], start[0])) continue;
                    if (thread < bins_y) along_y.fill(a.rule, axes[0], change_y, p + thread, thread, a.size[0], start[0]);
                    __syncthreads();
                    if (!__syncthreads_or(thread < PIXELS && along_y.range(thread, bins_y))) continue;
                    for (int q = 0; q < a.rule.bins[1]; q += BINS) {
                        const int bins_x = min(BINS, a.rule.bins[1] - q);
                        if (!near(axes[1], q, q + bins_x, a.size[1], start[1])) continue;
                        if (thread < bins_x) along_x.fill(a.rule, axes[1], change_x, q + thread, thread, a.size[1], start[1]);
                        __syncthreads();
                        if (__syncthreads_or(thread < PIXELS && along_x.range(thread, bins_x))) {
                            for (int m = 0; m < OUTPUTS; ++m) {
                                const int place = thread + m * THREADS;
                                if (place >= outputs) break;
                                int c, y, x;
                                split(place, channels, rows, columns, c, y, x);
                                const Offset crop = (Offset)k * (Offset)a.output_strides[0] + (Offset)(first_channel + c) * (Offset)a.output_strides[1];
                                for (int i = along_y.first[y]; i < along_y.stop[y]; ++i) {
                                    const Compute weight = along_y.weight[i][y];
                                    if (weight == 0) continue;  // 0 times NaN is not 0
                                    const Offset row = crop + (Offset)(p + i) * (Offset)a.output_strides[2];
                                    Compute sum = 0;
                                    for (int j = along_x.first[x]; j < along_x.stop[x]; ++j)
                                        if (along_x.weight[j][x] != 0)
                                            sum += along_x.weight[j][x] * get_grad(a.grad_output, row + (Offset)(q + j) * (Offset)a.output_strides[3]);
                                    total[m] += weight * sum;
                                }
                            }
                        }
                        __syncthreads();
                    }
                }
            }
            __syncthreads();
        }
    }
    for (int m = 0; m < OUTPUTS; ++m) {
        const int place = thread + m * THREADS;
        if (place >= outputs) break;
        int c, y, x;
        split(place, channels, rows, columns, c, y, x);
        put(a.result,
            (Offset)n * (Offset)a.feature_strides[0] + (Offset)(first_channel + c) * (Offset)a.feature_strides[1] +
                (Offset)(start[0] + y) * (Offset)a.feature_strides[2] + (Offset)(start[1] + x) * (Offset)a.feature_strides[3],
            total[m]);
    }
}
