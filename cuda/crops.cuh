// The crops, or their derivative along directions. A block owns a tile of one box's bins, for some of its channels.

const int READS = 2;  // taps along x whose pixels a loop reads together

// `LEVELED`: whether a level is subtracted from the pixels, which is exact where weights are changes, that add up to 0.
template <bool LEVELED>
DEVICE void make_crops(const Arguments& a, Task& task, TapTable<Weight>* along, long long& image) {
    task.find(a, true, a.rule.bins);
    bool held = false;
    for (int first = 0; first < task.spots(); first += blockDim.x) {
        const Spot spot(task, first + threadIdx.x, false);
        Compute total[LANES] = {};
        bool sampled = false;
        for_taps(a, task, along, image, held, LEVELED ? 2 : 1, [&](int) {
            if (spot.lanes <= 0) return;
            const Offset plane = (Offset)image * (Offset)a.feature_strides[0] +
                                 (Offset)spot.channel * (Offset)a.feature_strides[1];
            const int taps_y = along[0].count[spot.y], taps_x = along[1].count[spot.x];
            if (taps_y == 0 || taps_x == 0) return;
            sampled = true;
            by_lanes(spot.lanes, a.packed_features, [&](auto whole) {
                Compute level[LANES];
                if (LEVELED) read_level(whole, a, along, spot, plane, level);
                for (int i = 0; i < taps_y; ++i) {
                    const Tap<Weight> y = along[0].taps[spot.y][i];
                    Compute sum[LANES] = {};
                    UNROLL_READS for (int j = 0; j < taps_x; ++j) {
                        const Tap<Weight> x = along[1].taps[spot.x][j];
                        Compute values[LANES];
                        read_lanes<Feature>(whole, a.features, plane + y.offset + x.offset, (Offset)a.feature_strides[1],
                                            spot.lanes, values);
                        UNROLL for (int l = 0; l < LANES; ++l)
                            sum[l] += x.weight.value * (LEVELED ? values[l] - level[l] : values[l]);
                    }
                    UNROLL for (int l = 0; l < LANES; ++l) total[l] += y.weight.value * sum[l];
                }
            });
        });
        if (spot.lanes <= 0) continue;
        // of a bin without any sample inside the image; its derivative is 0
        if (image < 0 || (!sampled && !LEVELED)) {
            const Compute value = image < 0 ? (Compute)NAN_VALUE : (Compute)a.rule.extrapolation_value;
            UNROLL for (int l = 0; l < LANES; ++l) total[l] = value;
        }
        write_lanes(a.result,
            (Offset)task.item * (Offset)a.output_strides[0] + (Offset)spot.channel * (Offset)a.output_strides[1] +
                (Offset)(task.first[0] + spot.y) * (Offset)a.output_strides[2] +
                (Offset)(task.first[1] + spot.x) * (Offset)a.output_strides[3],
            (Offset)a.output_strides[1], spot.lanes, a.packed_crops, total);
    }
}
