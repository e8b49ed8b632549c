// Crops. A block works on a tile of one box's bins, for some of its channels.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const Arguments a) {
    __shared__ TapTable<Weight> along[2];
    __shared__ long long image;
    const Task task(a, a.rule.bins);
    bool held = false;
    for (int first = 0; first < task.spots(); first += THREADS * SPOTS) {
        Compute total[SPOTS][LANES];
        bool inside[SPOTS];
        UNROLL for (int m = 0; m < SPOTS; ++m) {
            inside[m] = false;
            UNROLL for (int l = 0; l < LANES; ++l) total[m][l] = 0;
        }
        for_taps(a, task, along, image, held, [&](int) {
            UNROLL for (int m = 0; m < SPOTS; ++m) {
                const Spot spot(task, first + threadIdx.x + m * THREADS);
                if (spot.lanes == 0) continue;
                const Offset plane = (Offset)image * (Offset)a.feature_strides[0] + (Offset)spot.channel * (Offset)a.feature_strides[1];
                const int taps_y = along[0].count[spot.y], taps_x = along[1].count[spot.x];
                inside[m] = inside[m] || (taps_y > 0 && taps_x > 0);
                by_lanes(spot.lanes, a.packed_features, [&](auto whole) {
                    for (int i = 0; i < taps_y; ++i) {
                        const Tap<Weight> y = along[0].taps[spot.y][i];
                        Compute sum[LANES] = {};
                        UNROLL_READS for (int j = 0; j < taps_x; ++j) {
                            const Tap<Weight> x = along[1].taps[spot.x][j];
                            Compute values[LANES];
                            read_lanes<Feature>(whole, a.features, plane + y.place + x.place, (Offset)a.feature_strides[1],
                                                spot.lanes, values);
                            UNROLL for (int l = 0; l < LANES; ++l) sum[l] += x.weight.value * values[l];
                        }
                        UNROLL for (int l = 0; l < LANES; ++l) total[m][l] += y.weight.value * sum[l];
                    }
                });
            }
        });
        UNROLL for (int m = 0; m < SPOTS; ++m) {
            const Spot spot(task, first + threadIdx.x + m * THREADS);
            if (spot.lanes == 0) continue;
            // beyond the image; of a derivative there is nothing there
            if (image < 0 || (!inside[m] && a.direction_count == 0)) {
                const Compute value = image < 0 ? (Compute)NAN_VALUE : (Compute)a.rule.extrapolation_value;
                UNROLL for (int l = 0; l < LANES; ++l) total[m][l] = value;
            }
            write_lanes(a.result,
                (Offset)task.item * (Offset)a.output_strides[0] + (Offset)spot.channel * (Offset)a.output_strides[1] +
                    (Offset)(task.first[0] + spot.y) * (Offset)a.output_strides[2] +
                    (Offset)(task.first[1] + spot.x) * (Offset)a.output_strides[3],
                (Offset)a.output_strides[1], spot.lanes, a.packed_crops, total[m]);
        }
    }
}
