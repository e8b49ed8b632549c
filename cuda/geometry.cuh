// geometry.py's twin: from a box to sample positions and taps, with the same operations in the same order. The names
// are the same; what is said there is not said again. `Real` is the precision of positions.
//
// Comparisons are made in double, to which float goes exactly: the compiler's own float comparisons flush subnormals.

enum { CROP_AND_RESIZE, ROI_CROP_CENTERS, ROI_CROP_CORNERS, ROI_ALIGN };

const int EVERY_SAMPLE = 16;

struct Rule {
    double spatial_scale, extrapolation_value;
    int dialect, bins[2], columns[4], sampling_ratio, aligned, nearest;
};

struct Axis {
    Real start, bin;
    long long samples;
    double start_slope[2], bin_slope;  // d start / d (low, high); d bin / d high, and its negative for low
};

struct Taps {
    bool inside;
    int low, high;
    Real fraction;
};

DEVICE bool is_finite(Real v) {
    double d = widen(v);
    return d - d == 0;
}

DEVICE bool finite_box(const Real* edges) {
    return is_finite(edges[0]) && is_finite(edges[1]) && is_finite(edges[2]) && is_finite(edges[3]);
}

DEVICE Axis resolve(const Rule& rule, Real low, Real high, int axis, int size) {
    Axis result;
    const int bins = rule.bins[axis];
    Real last = (Real)(size - 1);
    result.samples = 1;
    result.start_slope[1] = 0;
    if (rule.dialect == ROI_ALIGN) {
        const Real scale = narrow(rule.spatial_scale, Real());
        const Real offset = rule.aligned ? (Real)0.5 : (Real)0;
        result.start = sub(mul(low, scale), offset);
        Real extent = sub(sub(mul(high, scale), offset), result.start);
        bool grows = true;
        if (!rule.aligned) {
            grows = widen(extent) >= 1;
            if (widen(extent) < 1) extent = (Real)1;
        }
        result.bin = div(extent, (Real)bins);
        if (rule.sampling_ratio > 0) {
            result.samples = rule.sampling_ratio;
        } else {
            const double most = sizeof(Real) == 4 ? 8388608.0 : 4503599627370496.0;
            double wanted = widen(round_up(result.bin));
            if (wanted > most) wanted = most;
            result.samples = wanted > 0 ? (long long)wanted : 0;
        }
        result.start_slope[0] = widen(scale);
        result.bin_slope = grows ? widen(scale) / bins : 0;
        return result;
    }
    double unit = widen(last);
    if (rule.dialect != CROP_AND_RESIZE) {
        unit = 1;
        if (size == 1) last = (Real)1;
        if (rule.dialect == ROI_CROP_CENTERS) {
            const Real spacing = div(sub(high, low), (Real)bins);
            low = div(sub(add(low, div(spacing, (Real)2)), (Real)0.5), last);
            high = add(low, div(mul(spacing, (Real)(bins - 1)), last));
        } else {
            low = div(low, last);
            high = div(high, last);
        }
    }
    if (bins > 1) {
        result.start = mul(low, last);
        result.bin = div(mul(sub(high, low), last), (Real)(bins - 1));
    } else {
        result.start = mul(mul((Real)0.5, add(low, high)), last);
        result.bin = (Real)0;
    }
    if (rule.dialect == ROI_CROP_CENTERS) {
        result.start_slope[1] = 0.5 / bins;
        result.start_slope[0] = 1 - result.start_slope[1];
        result.bin_slope = 1.0 / bins;
    } else if (bins > 1) {
        result.start_slope[0] = unit;
        result.bin_slope = unit / (bins - 1);
    } else {
        result.start_slope[0] = result.start_slope[1] = 0.5 * unit;
        result.bin_slope = 0;
    }
    return result;
}

DEVICE Real origin_of(const Axis& axis, int p) { return add(axis.start, mul((Real)p, axis.bin)); }

DEVICE Real position_of(const Rule& rule, const Axis& axis, Real origin, long long i) {
    const Real offset = rule.dialect == ROI_ALIGN ? (Real)0.5 : (Real)0;
    return add(origin, div(mul(add((Real)i, offset), axis.bin), (Real)axis.samples));
}

// Sample indices [first, stop) of a bin, outside of which no position lies in [from, to].
DEVICE void candidates(const Axis& axis, Real origin, double from, double to, long long& first, long long& stop) {
    first = 0;
    stop = axis.samples;
    if (stop <= EVERY_SAMPLE) return;
    const double start = widen(origin), step = widen(axis.bin), pitch = step / (double)axis.samples;
    if (!(start - start == 0) || !(step - step == 0)) { stop = 0; return; }
    if (pitch == 0) return;
    const double rounding = 8 * (sizeof(Real) == 4 ? 1.1920928955078125e-7 : 2.220446049250313e-16);
    const double slack = rounding * fabs(widen(axis.start)) + rounding * fabs(start) + rounding * fabs(step);
    const double a = ((from - slack) - start) / pitch - 0.5, b = ((to + slack) - start) / pitch - 0.5;
    const double least = floor(a < b ? a : b), most = ceil(a < b ? b : a) + 1, count = (double)stop;
    first = least <= 0 ? 0 : least >= count ? stop : (long long)least;
    const long long end = most <= 0 ? 0 : most >= count ? stop : (long long)most;
    stop = end < first ? first : end;
}

DEVICE Taps taps_of(const Rule& rule, Real position, int size) {
    Taps taps = {false, 0, 0, (Real)0};
    const double v = widen(position), last = size - 1;
    const bool clamps = rule.dialect == ROI_ALIGN;
    taps.inside = clamps ? (v >= -1 && v <= size) : (v >= 0 && v <= last);
    if (!taps.inside) return taps;
    if (rule.nearest) {
        const int low = (int)v;
        taps.low = taps.high = low + (v - low >= 0.5 ? 1 : 0);
        return taps;
    }
    if (clamps) {
        if (v < 0) position = (Real)0;
        if (v > last) position = (Real)(size - 1);
        taps.low = (int)widen(position);
        if (taps.low > size - 1) taps.low = size - 1;  // rounded up
        taps.high = taps.low + (v >= 0 ? 1 : 0);
        if (taps.high > size - 1) taps.high = size - 1;
    } else {
        taps.low = (int)v;
        if (rule.dialect == CROP_AND_RESIZE) {
            taps.high = (int)ceil(v);
        } else {
            if (taps.low > size - 2) taps.low = size >= 2 ? size - 2 : 0;
            taps.high = taps.low + 1 > size - 1 ? size - 1 : taps.low + 1;
        }
    }
    taps.fraction = sub(position, (Real)taps.low);
    return taps;
}
