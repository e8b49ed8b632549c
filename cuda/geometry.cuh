// geometry.py's twin: from a box to sample positions and taps, with the same operations in the same order. The names
// are the same; what is said there is not said again. `Real` is the precision of positions.

enum { CROP_AND_RESIZE, ROI_CROP_CENTERS, ROI_CROP_CORNERS, ROI_ALIGN };

const int EVERY_SAMPLE = 16;

struct Rule {
    double spatial_scale, extrapolation_value;
    int dialect, bins[2], columns[4], sampling_ratio, aligned, nearest;
};

struct Axis {
    Real start, bin;
    long long samples;
};

struct EdgeSlopes {
    double start[2], bin;  // d start / d (low, high); d bin / d high, and its negative for low
};

struct Taps {
    bool inside;
    int low, high;
    Real fraction;
};

DEVICE bool is_finite(Real v) { return v - v == 0; }

DEVICE bool finite_box(const Real* edges) {
    return is_finite(edges[0]) && is_finite(edges[1]) && is_finite(edges[2]) && is_finite(edges[3]);
}

// Where a box of ROI_ALIGN begins, and how far it reaches before it is widened.
DEVICE void extent_of(const Rule& rule, Real low, Real high, Real& start, Real& extent) {
    const Real scale = narrow(rule.spatial_scale, Real()), offset = rule.aligned ? (Real)0.5 : (Real)0;
    start = sub(mul(low, scale), offset);
    extent = sub(sub(mul(high, scale), offset), start);
}

DEVICE Axis resolve(const Rule& rule, Real low, Real high, int axis, int size) {
    Axis result;
    const int bins = rule.bins[axis];
    if (rule.dialect == ROI_ALIGN) {
        Real extent;
        extent_of(rule, low, high, result.start, extent);
        if (!rule.aligned && less(extent, (Real)1)) extent = (Real)1;
        result.bin = div(extent, (Real)bins);
        if (rule.sampling_ratio > 0) {
            result.samples = rule.sampling_ratio;
        } else {
            const Real most = sizeof(Real) == 4 ? (Real)8388608.0 : (Real)4503599627370496.0;
            Real wanted = round_up(result.bin);
            if (less(most, wanted)) wanted = most;
            result.samples = less((Real)0, wanted) ? (long long)wanted : 0;
        }
        return result;
    }
    result.samples = 1;
    Real last = (Real)(size - 1);
    if (rule.dialect != CROP_AND_RESIZE) {
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
    return result;
}

DEVICE EdgeSlopes edge_slopes(const Rule& rule, Real low, Real high, int axis, int size) {
    const int bins = rule.bins[axis];
    if (rule.dialect == ROI_ALIGN) {
        Real start, extent;
        extent_of(rule, low, high, start, extent);
        const double scale = widen(narrow(rule.spatial_scale, Real()));
        const bool grows = rule.aligned || at_least(extent, (Real)1);
        return {{scale, 0}, grows ? scale / bins : 0};
    }
    if (rule.dialect == ROI_CROP_CENTERS) return {{1 - 0.5 / bins, 0.5 / bins}, 1.0 / bins};
    const double unit = rule.dialect == CROP_AND_RESIZE ? size - 1 : 1;
    if (bins > 1) return {{unit, 0}, unit / (bins - 1)};
    return {{0.5 * unit, 0.5 * unit}, 0};
}

DEVICE Real origin_of(const Axis& axis, int p) { return add(axis.start, mul((Real)p, axis.bin)); }

// Where in its part of a bin a sample lies.
DEVICE Real offset_of(const Rule& rule) { return rule.dialect == ROI_ALIGN ? (Real)0.5 : (Real)0; }

DEVICE Real position_of(const Rule& rule, const Axis& axis, Real origin, long long i) {
    return add(origin, div(mul(add((Real)i, offset_of(rule)), axis.bin), (Real)axis.samples));
}

// Sample indices [first, stop) of a bin, outside of which no position lies in [from, to].
DEVICE void candidates(const Axis& axis, Real origin, int from, int to, long long& first, long long& stop) {
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
    const bool clamps = rule.dialect == ROI_ALIGN;
    taps.inside = at_least(position, clamps ? (Real)-1 : (Real)0) &&
                  at_least(round_down(clamps ? size : size - 1, Real()), position);
    if (!taps.inside) return taps;
    if (rule.nearest) {
        const int low = (int)position;
        taps.low = taps.high = low + (at_least(sub(position, (Real)low), (Real)0.5) ? 1 : 0);
        return taps;
    }
    if (clamps) {
        const bool inner = at_least(position, (Real)0);
        const Real last = (Real)(size - 1);
        if (!inner) position = (Real)0;
        if (less(last, position)) position = last;
        taps.low = (int)min((long long)position, (long long)(size - 1));  // `last` may have been rounded up
        taps.high = min(taps.low + (inner ? 1 : 0), size - 1);
    } else {
        taps.low = (int)position;
        if (rule.dialect == CROP_AND_RESIZE) {
            taps.high = (int)round_up(position);
        } else {
            taps.low = min(taps.low, max(size - 2, 0));
            taps.high = min(taps.low + 1, size - 1);
        }
    }
    taps.fraction = sub(position, (Real)taps.low);
    return taps;
}
