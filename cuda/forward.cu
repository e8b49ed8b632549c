// Crops. A block works on up to TILE x TILE bins of one box, for some of its channels: it reads the taps of the bins
// once, and every thread adds up a few outputs.

const int THREADS = 256;
const int OUTPUTS = 8;  // of a thread

extern "C" __global__ void __launch_bounds__(THREADS) forward(const Arguments a) {
    __shared__ TapTable<false> along_y, along_x;
    const Task task = task_of(a, (a.rule.bins[0] + TILE - 1) / TILE, (a.rule.bins[1] + TILE - 1) / TILE);
    const long long k = task.item;
    const int first_channel = task.first_channel, first_p = task.tile_y * TILE, first_q = task.tile_x * TILE;
    const int channels = min(a.channels_at_once, a.channels - first_channel);
    const int bins_y = min(TILE, a.rule.bins[0] - first_p), bins_x = min(TILE, a.rule.bins[1] - first_q);
    const int outputs = channels * bins_y * bins_x, thread = threadIdx.x;

    long long image;
    Axis axes[2];
    const bool sound = open_box(a, k, image, axes);
    Compute total[OUTPUTS];
    bool inside[OUTPUTS];
    for (int m = 0; m < OUTPUTS; ++m) {
        total[m] = 0;
        inside[m] = false;
    }
    for (int term = 0; sound && term < term_count(a); ++term) {  // the same for the whole block
        TapStream<false> stream_y, stream_x;
        const bool reads_y = thread < bins_y, reads_x = thread >= 32 && thread - 32 < bins_x;
        const Change change_y = change_of(a, k, axes, term, 0), change_x = change_of(a, k, axes, term, 1);
        if (reads_y) stream_y.start(axes[0], change_y, first_p + thread, a.size[0]);
        bool more_y = true;
        while (more_y) {
            const bool unread_y = reads_y && along_y.read(a.rule, stream_y, thread);
            if (reads_x) stream_x.start(axes[1], change_x, first_q + thread - 32, a.size[1]);
            bool more_x = true;
            while (more_x) {
                const bool unread_x = reads_x && along_x.read(a.rule, stream_x, thread - 32);
                more_x = __syncthreads_or(unread_x);
                for (int m = 0; m < OUTPUTS; ++m) {
                    const int place = thread + m * THREADS;
                    if (place >= outputs) break;
                    int c, p, q;
                    split(place, channels, bins_y, bins_x, c, p, q);
                    const Offset plane = (Offset)image * (Offset)a.feature_strides[0] + (Offset)(first_channel + c) * (Offset)a.feature_strides[1];
                    inside[m] = inside[m] || (along_y.count[p] > 0 && along_x.count[q] > 0);
                    for (int i = 0; i < along_y.count[p]; ++i) {
                        const Offset row = plane + (Offset)along_y.pixel[p][i] * (Offset)a.feature_strides[2];
                        Compute sum = 0;
                        for (int j = 0; j < along_x.count[q]; ++j)
                            sum += along_x.weight[q][j] * get(a.features, row + (Offset)along_x.pixel[q][j] * (Offset)a.feature_strides[3]);
                        total[m] += along_y.weight[p][i] * sum;
                    }
                }
                __syncthreads();
            }
            more_y = __syncthreads_or(unread_y);
        }
    }
    for (int m = 0; m < OUTPUTS; ++m) {
        const int place = thread + m * THREADS;
        if (place >= outputs) break;
        int c, p, q;
        split(place, channels, bins_y, bins_x, c, p, q);
        const bool has_value = inside[m] || a.direction_count > 0;
        const Compute value = !sound ? (Compute)NAN_VALUE : has_value ? total[m] : (Compute)a.rule.extrapolation_value;
        put(a.result,
            (Offset)k * (Offset)a.output_strides[0] + (Offset)(first_channel + c) * (Offset)a.output_strides[1] +
                (Offset)(first_p + p) * (Offset)a.output_strides[2] + (Offset)(first_q + q) * (Offset)a.output_strides[3],
            value);
    }
}
