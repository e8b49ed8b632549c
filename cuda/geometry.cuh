// geometry.py's twin: from a box to sample positions and taps, by the same operations in the same order. Functions have
// the same names, with `_of` where a variable would have the name too; what geometry.py explains is not repeated here.
// `Real` is the precision of positions.

enum Frame { NORMALIZED, CENTERS, CORNERS, SCALED };
enum TapsRule { LINEAR, LINEAR_CEIL, NEAREST };
enum Border { CUT, CLAMP };

const int EVERY_SAMPLE = 16;

struct Rule {
    double spatial_scale, extrapolation_value;
    int frame, taps, border, bins[2], columns[4], sampling_ratio, aligned;
};

// What `affine` returns.
struct Axis {
    Real start, step;
    long long samples;
};

struct EdgeSlopes {
    double start[2], step;  // d start / d (low, high); d step / d high, of which d step / d low is the negative
};

struct Taps {
    int low, high;
    Real fraction;  // the weight of `high`
};

DEVICE bool is_finite(Real v) { return v - v == 0; }

DEVICE bool finite_box(const Real* edges) {
    return is_finite(edges[0]) && is_finite(edges[1]) && is_finite(edges[2]) && is_finite(edges[3]);
}

DEVICE void extent_of(const Rule& rule, Real low, Real high, Real& start, Real& length) {
    const Real scale = narrow(rule.spatial_scale, Real()), offset = rule.aligned ? (Real)0.5 : (Real)0;
    start = sub(mul(low, scale), offset);
    length = sub(sub(mul(high, scale), offset), start);
}

DEVICE Axis affine(const Rule& rule, Real low, Real high, int bins, int size) {
    Axis result;
    const Real n = (Real)bins;
    if (rule.frame == SCALED) {
        Real length;
        extent_of(rule, low, high, result.start, length);
        if (!rule.aligned && less(length, (Real)1)) length = (Real)1;
        result.step = div(length, n);
        if (rule.sampling_ratio > 0) {
            result.samples = rule.sampling_ratio;
        } else {
            const Real most = sizeof(Real) == 4 ? (Real)8388608.0 : (Real)4503599627370496.0;
            Real wanted = round_up(result.step);
            if (less(most, wanted)) wanted = most;
            result.samples = less((Real)0, wanted) ? (long long)wanted : 0;
        }
        return result;
    }
    result.samples = 1;
    Real last = (Real)(size - 1);
    if (rule.frame != NORMALIZED) {
        if (less(last, (Real)1)) last = (Real)1;
        if (rule.frame == CENTERS) {
            const Real spacing = div(sub(high, low), n);
            low = div(sub(add(low, div(spacing, (Real)2)), (Real)0.5), last);
            high = add(low, div(mul(spacing, sub(n, (Real)1)), last));
        } else {
            low = div(low, last);
            high = div(high, last);
        }
    }
    if (bins > 1) {
        result.start = mul(low, last);
        result.step = div(mul(sub(high, low), last), sub(n, (Real)1));
    } else {
        result.start = mul(mul((Real)0.5, add(low, high)), last);
        result.step = (Real)0;
    }
    return result;
}

DEVICE EdgeSlopes edge_slopes(const Rule& rule, Real low, Real high, int bins, int size) {
    if (rule.frame == SCALED) {
        Real start, length;
        extent_of(rule, low, high, start, length);
        const double scale = widen(narrow(rule.spatial_scale, Real()));
        const bool grows = rule.aligned || at_least(length, (Real)1);
        return {{scale, 0}, grows ? scale / bins : 0};
    }
    if (rule.frame == CENTERS) return {{1 - 0.5 / bins, 0.5 / bins}, 1.0 / bins};
    const double unit = rule.frame == NORMALIZED ? size - 1 : 1;
    if (bins > 1) return {{unit, 0}, unit / (bins - 1)};
    return {{0.5 * unit, 0.5 * unit}, 0};
}

DEVICE Real offset_of(const Rule& rule) { return rule.frame == SCALED ? (Real)0.5 : (Real)0; }

DEVICE Real origin_of(const Axis& axis, int p) { return add(axis.start, mul((Real)p, axis.step)); }

DEVICE Real position_of(const Rule& rule, const Axis& axis, Real origin, long long i) {
    return add(origin, div(mul(add((Real)i, offset_of(rule)), axis.step), (Real)axis.samples));
}

// `weight`: that of one sample in its bin, 1 / samples.
DEVICE Compute lever_of(const Rule& rule, int p, long long i, Compute weight) {
    return (Compute)p + ((Compute)i + (Compute)offset_of(rule)) * weight;
}

DEVICE bool is_inside(const Rule& rule, Real position, int size) {
    if (rule.border == CLAMP) return at_least(position, (Real)-1) && at_least(round_down(size, Real()), position);
    return at_least(position, (Real)0) && at_least(round_down(size - 1, Real()), position);
}

// Of a position inside. Whatever the rule, both are pixels of the image.
DEVICE Taps taps_of(const Rule& rule, Real position, int size) {
    const Real end = (Real)(size - 1);
    const int last = size - 1, inner = at_least(position, (Real)0) ? 1 : 0;
    if (!inner) position = (Real)0;
    if (less(end, position)) position = end;
    Taps taps = {(int)min((long long)position, (long long)last), 0, (Real)0};  // `end` may have been rounded up
    if (rule.taps == NEAREST) {
        const int up = at_least(sub(position, (Real)taps.low), (Real)0.5) ? 1 : 0;
        taps.low = taps.high = min(taps.low + up, last);
        return taps;
    }
    if (rule.border == CLAMP) {
        taps.high = min(taps.low + inner, last);
    } else if (rule.taps == LINEAR_CEIL) {
        taps.high = (int)min((long long)round_up(position), (long long)last);
    } else {
        taps.low = min(taps.low, max(last - 1, 0));
        taps.high = min(taps.low + 1, last);
    }
    taps.fraction = sub(position, (Real)taps.low);
    return taps;
}

// Sample numbers [first, stop) of a bin, outside of which no position lies in [from, to].
DEVICE void candidates(const Axis& axis, Real origin, int from, int to, long long& first, long long& stop) {
    first = 0;
    stop = axis.samples;
    if (stop <= EVERY_SAMPLE) return;
    const double begin = widen(origin), length = widen(axis.step), pitch = length / (double)axis.samples;
    if (!(begin - begin == 0) || !(length - length == 0)) { stop = 0; return; }
    if (pitch == 0) return;
    const double rounding = 8 * (sizeof(Real) == 4 ? 1.1920928955078125e-7 : 2.220446049250313e-16);
    const double slack = rounding * fabs(widen(axis.start)) + rounding * fabs(begin) + rounding * fabs(length);
    const double a = ((from - slack) - begin) / pitch - 0.5, b = ((to + slack) - begin) / pitch - 0.5;
    const double least = floor(a < b ? a : b), most = ceil(a < b ? b : a) + 1, count = (double)stop;
    first = least <= 0 ? 0 : least >= count ? stop : (long long)least;
    const long long end = most <= 0 ? 0 : most >= count ? stop : (long long)most;
    stop = end < first ? first : end;
}
