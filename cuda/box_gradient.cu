// The gradient with respect to the boxes. A block owns a tile of one box's bins, for some of its channels: each thread
// adds up its outputs, the threads' sums are added in a fixed order, and a second kernel adds those of a box's blocks.

// Adds the sums of `width` neighbours up into the first of them.
DEVICE void add_up(Compute (*sums)[THREADS], int width) {
    const int thread = threadIdx.x;
    for (int half = width / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread % width < half)
            for (int s = 0; s < SUMS; ++s) sums[s][thread] += sums[s][thread + half];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) box_gradient(const Arguments a) {
    __shared__ Task task;
    __shared__ TapTable<SlopedWeight> along[2];
    __shared__ Compute sums[SUMS][THREADS];
    __shared__ long long image;
    task.find(a, true, a.rule.bins);
    Compute total[SUMS] = {};
    bool held = false;
    if (a.rule.taps != NEAREST) for_taps(a, task, along, image, held, term_count(a), [&](int) {
        for (int number = threadIdx.x; number < task.spots(); number += blockDim.x) {
            const Spot spot(task, number, false);
            const int taps_y = along[0].count[spot.y], taps_x = along[1].count[spot.x];
            if (taps_y == 0 || taps_x == 0) continue;
            const Offset crop = (Offset)task.item * (Offset)a.output_strides[0] +
                                (Offset)spot.channel * (Offset)a.output_strides[1] +
                                (Offset)(task.first[0] + spot.y) * (Offset)a.output_strides[2] +
                                (Offset)(task.first[1] + spot.x) * (Offset)a.output_strides[3];
            const Offset plane = (Offset)image * (Offset)a.feature_strides[0] +
                                 (Offset)spot.channel * (Offset)a.feature_strides[1];
            Compute grads[LANES];
            by_lanes(spot.lanes, a.packed_crops, [&](auto whole) {
                read_lanes<Grad>(whole, a.grad_output, crop, (Offset)a.output_strides[1], spot.lanes, grads);
            });
            by_lanes(spot.lanes, a.packed_features, [&](auto whole) {
                Compute level[LANES];
                read_level(whole, a, along, spot, plane, level);
                for (int i = 0; i < taps_y; ++i) {
                    const Tap<SlopedWeight> y = along[0].taps[spot.y][i];
                    SlopedWeight sum = {};
                    NO_UNROLL for (int j = 0; j < taps_x; ++j) {
                        const Tap<SlopedWeight> x = along[1].taps[spot.x][j];
                        Compute values[LANES], product = 0;
                        read_lanes<Feature>(whole, a.features, plane + y.offset + x.offset, (Offset)a.feature_strides[1],
                                            spot.lanes, values);
                        UNROLL for (int l = 0; l < LANES; ++l) product += grads[l] * (values[l] - level[l]);
                        sum.value += x.weight.value * product;
                        sum.to_start += x.weight.to_start * product;
                        sum.to_step += x.weight.to_step * product;
                    }
                    total[0] += y.weight.to_start * sum.value;
                    total[1] += y.weight.to_step * sum.value;
                    total[2] += y.weight.value * sum.to_start;
                    total[3] += y.weight.value * sum.to_step;
                }
            });
        }
    });
    for (int s = 0; s < SUMS; ++s) sums[s][threadIdx.x] = total[s];
    add_up(sums, blockDim.x);
    if (threadIdx.x == 0)
        for (int s = 0; s < SUMS; ++s) ((Compute*)a.workspace)[(task.item * a.blocks_per_item + task.number) * SUMS + s] = sums[s][0];
}

// A few threads per box.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) box_gradient_sum(const Arguments a) {
    __shared__ Compute sums[SUMS][THREADS];
    const int WIDTH = THREADS / BOXES_PER_BLOCK;
    const long long k = (a.first_block + blockIdx.x) * BOXES_PER_BLOCK + threadIdx.x / WIDTH;
    Compute total[SUMS] = {};
    for (int block = threadIdx.x % WIDTH; k < a.count && block < a.blocks_per_item; block += WIDTH)
        for (int s = 0; s < SUMS; ++s) total[s] += ((const Compute*)a.workspace)[(k * a.blocks_per_item + block) * SUMS + s];
    for (int s = 0; s < SUMS; ++s) sums[s][threadIdx.x] = total[s];
    add_up(sums, WIDTH);
    if (k >= a.count || threadIdx.x % WIDTH) return;
    Real edges[4];
    const bool sound = open_box(a, k, edges) >= 0;
    Box* gradient = (Box*)a.result + k * a.box_columns;
    for (int i = 0; i < a.box_columns; ++i) gradient[i] = (Box)0;
    for (int axis = 0; axis < 2; ++axis) {
        const EdgeSlopes slopes = edge_slopes(a.rule, edges[axis], edges[axis + 2], a.rule.bins[axis], a.size[axis]);
        const double to_start = sums[2 * axis][threadIdx.x], to_step = sums[2 * axis + 1][threadIdx.x];
        gradient[a.rule.columns[axis]] = (Box)(sound ? to_start * slopes.start[0] - to_step * slopes.step : NAN_VALUE);
        gradient[a.rule.columns[axis + 2]] = (Box)(sound ? to_start * slopes.start[1] + to_step * slopes.step : NAN_VALUE);
    }
}
