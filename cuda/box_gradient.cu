// The gradient to the boxes. A block works on one box: each thread adds up its share of the outputs, and the shares
// are added in a fixed order.

const int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) box_gradient(const Arguments a) {
    __shared__ TapTable<true> along_y, along_x;
    __shared__ Compute shares[4][THREADS];
    const long long k = a.first_block + blockIdx.x;
    const int thread = threadIdx.x;
    long long image;
    Axis axes[2];
    const bool sound = open_box(a, k, image, axes);
    Compute total[4] = {0, 0, 0, 0};  // to start and bin of y, then of x
    for (int term = 0; sound && !a.rule.nearest && term < term_count(a); ++term) {
        const Change change_y = change_of(a, k, axes, term, 0), change_x = change_of(a, k, axes, term, 1);
        for (int first_p = 0; first_p < a.rule.bins[0]; first_p += TILE)
            for (int first_q = 0; first_q < a.rule.bins[1]; first_q += TILE) {
                const int bins_y = min(TILE, a.rule.bins[0] - first_p), bins_x = min(TILE, a.rule.bins[1] - first_q);
                TapStream<true> stream_y, stream_x;
                const bool reads_y = thread < bins_y, reads_x = thread >= 32 && thread - 32 < bins_x;
                if (reads_y) stream_y.start(axes[0], change_y, first_p + thread, a.size[0]);
                bool more_y = true;
                while (more_y) {
                    const bool unread_y = reads_y && along_y.read(a.rule, stream_y, thread);
                    if (reads_x) stream_x.start(axes[1], change_x, first_q + thread - 32, a.size[1]);
                    bool more_x = true;
                    while (more_x) {
                        const bool unread_x = reads_x && along_x.read(a.rule, stream_x, thread - 32);
                        more_x = __syncthreads_or(unread_x);
                        for (Offset place = thread; place < (Offset)a.channels * bins_y * bins_x; place += THREADS) {
                            int c, p, q;
                            split(place, a.channels, bins_y, bins_x, c, p, q);
                            const Compute grad = get_grad(a.grad_output,
                                (Offset)k * (Offset)a.output_strides[0] + (Offset)c * (Offset)a.output_strides[1] +
                                    (Offset)(first_p + p) * (Offset)a.output_strides[2] + (Offset)(first_q + q) * (Offset)a.output_strides[3]);
                            const Offset plane = (Offset)image * (Offset)a.feature_strides[0] + (Offset)c * (Offset)a.feature_strides[1];
                            Compute sums[4] = {0, 0, 0, 0};
                            for (int i = 0; i < along_y.count[p]; ++i) {
                                const Offset row = plane + (Offset)along_y.pixel[p][i] * (Offset)a.feature_strides[2];
                                Compute sum = 0, to_start = 0, to_bin = 0;
                                for (int j = 0; j < along_x.count[q]; ++j) {
                                    const Compute value = get(a.features, row + (Offset)along_x.pixel[q][j] * (Offset)a.feature_strides[3]);
                                    sum += along_x.weight[q][j] * value;
                                    to_start += along_x.to_start[q][j] * value;
                                    to_bin += along_x.to_bin[q][j] * value;
                                }
                                sums[0] += along_y.to_start[p][i] * sum;
                                sums[1] += along_y.to_bin[p][i] * sum;
                                sums[2] += along_y.weight[p][i] * to_start;
                                sums[3] += along_y.weight[p][i] * to_bin;
                            }
                            // an axis that has changed already changes no more
                            if (!change_y.wanted) total[0] += grad * sums[0], total[1] += grad * sums[1];
                            if (!change_x.wanted) total[2] += grad * sums[2], total[3] += grad * sums[3];
                        }
                        __syncthreads();
                    }
                    more_y = __syncthreads_or(unread_y);
                }
            }
    }
    for (int s = 0; s < 4; ++s) shares[s][thread] = total[s];
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half)
            for (int s = 0; s < 4; ++s) shares[s][thread] += shares[s][thread + half];
    }
    if (thread == 0) {
        Box* gradient = (Box*)a.result + k * a.box_columns;
        for (int i = 0; i < a.box_columns; ++i) gradient[i] = (Box)0;
        for (int axis = 0; axis < 2; ++axis) {
            const double to_start = shares[2 * axis][0], to_bin = shares[2 * axis + 1][0];
            const double low = sound ? to_start * axes[axis].start_slope[0] - to_bin * axes[axis].bin_slope : NAN_VALUE;
            const double high = sound ? to_start * axes[axis].start_slope[1] + to_bin * axes[axis].bin_slope : NAN_VALUE;
            gradient[a.rule.columns[axis]] = (Box)low;
            gradient[a.rule.columns[axis + 2]] = (Box)high;
        }
    }
}
