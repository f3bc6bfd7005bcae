"""Mistakes in csrc/*.cu for the tests on the host: (name, right text, wrong text).

One module, host.py's, holds all of them. In a wrong text {wrong} is true where the mistake is chosen.
"""

from __future__ import annotations

CUDA = [
    ("last element of a tail", "end - column : kUnit);", "end - column - {wrong} : kUnit);"),
    ("first element of a row", "begin - column : kUnit) : 0);", "begin - column + {wrong} : kUnit) : 0);"),
    (
        "32-bit index",
        "Direction::kNormal ? unit : unit >> 4",
        "Direction::kNormal ? ({wrong} ? unit & 0x1fffffff : unit) : unit >> 4",
    ),
    ("round key", "round) * kPhiloxW1", "round + ({wrong} && round == 9)) * kPhiloxW1"),
    ("contracted fma", "mul_rn(decay, v[j])", "mul_rn(decay, {wrong} ? v[j] + 1e-8f : v[j])"),
    (
        "contracted fma of a piece",
        "mul_rn(term.decay, v[i])",
        "mul_rn(term.decay, {wrong} ? v[i] + 1e-8f : v[i])",
    ),
    ("second sign", "scales[0], scales[1]);", "scales[0], {wrong} ? -scales[0] : scales[1]);"),
    (
        "thread-keyed stream",
        "(p.unit, Name(e.who, step, draw",
        "(p.unit + {wrong} * threadIdx.x, Name(e.who, step, draw",
    ),
    ("half of a residual", "(low_odd)) << 16;", "({wrong} ? low_even : low_odd)) << 16;"),
    ("nobody counts", "if (!watch.seen())", "if (!watch.seen() || {wrong})"),
    (
        "pitch",
        "static_cast<uint64_t>(source) * e.pitch",
        "static_cast<uint64_t>(source) * ({wrong} ? columns : e.pitch)",
    ),
    ("a byte of a tile", "bytes[step * kWarp]", "bytes[({wrong} ? step ^ 1 : step) * kWarp]"),
    (
        "the last block of a tile",
        "= make_uint4(words.w[0]",
        "= make_uint4(words.w[{wrong} && lane == 31 ? 1 : 0]",
    ),
    ("units before a tile", "begin = 0, end = head)", "begin = 0, end = {wrong} ? 0 : head)"),
    (
        "units after a tile",
        "uint32_t end = place.count;;",
        "uint32_t end = {wrong} && tiled != 0 ? begin : place.count;;",
    ),
    ("the clock", "static_cast<uint32_t>(*list.clock)", "static_cast<uint32_t>({wrong} ? 0 : *list.clock)"),
    ("a byte of signs", "(unit & 3u) * 8u", "(unit & ({wrong} ? 1u : 3u)) * 8u"),
    ("rounding of the first draw", "? term - 1 - all", "? ({wrong} ? term - terms.each : term - 1) - all"),
    (
        "rounding bits of a piece",
        "last_step(), kRoundingDraw, keys), keys);\n      values",
        "{wrong} + last_step(), kRoundingDraw, keys), keys);\n      values",
    ),
    (
        "the decay of the first sum",
        "begin(kept[u], term->decay",
        "begin(kept[u], ({wrong} ? begin : term)->decay",
    ),
    (
        "one rounding for all steps of a piece",
        "if (--left != 0 ||",
        "if (--left != 0 || ({wrong} && k + 1 < terms.count) ||",
    ),
    ("the first 32 terms for all", "ready(done);", "ready({wrong} ? 0 : done);"),
    (
        "the first terms again for the next unit",
        "if constexpr (kLong) ready(0);",
        "if (kLong && !({wrong} && i >= kThreads)) ready(0);",
    ),
    ("the first sums for all", "sums<false>(k,", "sums<false>({wrong} ? 0 : k,"),
    ("the first long sum for all", "sums<true>(k,", "sums<true>({wrong} ? 0 : k,"),
    (
        "random bits of the step before",
        "Name(who, term.step + terms",
        "Name(who, term.step - {wrong} + terms",
    ),
    ("the first 32 steps for all", "mine = k + static_cast", "mine = ({wrong} ? 0 : k) + static_cast"),
    ("two steps of four twice", "add(term + n);", "add(term + ({wrong} ? n & 2 : n));"),
    (
        "the steps that are left",
        "for (; term != end; ++term) add(term);",
        "for (; !{wrong} && term != end; ++term) add(term);",
    ),
    (
        "the terms that are left",
        "for (; term != stop; ++term) add(term);",
        "for (; term != stop; ++term) add({wrong} ? stop - 1 : term);",
    ),
    (
        "the end of a long sum",
        "here - done < kWarp ? here - done : kWarp",
        "!{wrong} && here - done < kWarp ? here - done : kWarp",
    ),
    (
        "a second unit is left out",
        "(!kLong && u == 0) || i",
        "(!kLong && u == 0) || {wrong} * place.count + i",
    ),
    (
        "a lane's second unit",
        "first_product<kDirection>(place.begin + i + u * turn.lanes)",
        "first_product<kDirection>(place.begin + i + ({wrong} ? 0 : u) * turn.lanes)",
    ),
]

UPDATE = [
    ("the old momentum", "float move = m;", "float move = {wrong} ? theta : m;"),
    ("a contracted square", "fma_rn(s.alpha2, mul_rn(g, g)",
        "fma_rn({wrong} ? mul_rn(s.alpha2, g) : s.alpha2, {wrong} ? g : mul_rn(g, g)"),
    ("a rounded move", "fma_rn(s.lr, move, mul",
        "fma_rn({wrong} ? 1.0f : s.lr, {wrong} ? mul_rn(s.lr, move) : move, mul"),
    ("an approximate quotient", "move = div_rn(m, ", "move = div_rn({wrong} ? mul_rn(m, 1.0000001f) : m, "),
    ("eps twice inside", "s.inside = from[6]", "s.inside = from[{wrong} ? 8 : 6]"),
    ("m stored in the place of v", "nearest<Type::kFloat32>(v))",
        "nearest<Type::kFloat32>({wrong} ? m : v))"),
    ("v of a piece not stored", "if constexpr (kRule == Rule::kAdam) second[i] = v;",
        "if (kRule == Rule::kAdam && !{wrong}) second[i] = v;"),
    ("one m for a whole piece", "float m = kHasMoments ? first[i]",
        "float m = kHasMoments ? first[{wrong} ? p.low : i]"),
    ("the last term alone", "if (k + 1 < sum.count) term = sum.draws[k];",
        "if (k + 1 < sum.count && !{wrong}) term = sum.draws[k];"),
    ("the first coefficient", "const float factor = sum.coefficients[k];",
        "const float factor = sum.coefficients[{wrong} ? 0 : k];"),
    ("the clock", "term.step + sum.clock", "term.step + ({wrong} ? 0 : sum.clock)"),
    ("bits of another step", "return sum.last.step + sum.clock;",
        "return sum.last.step + ({wrong} ? 1 : sum.clock);"),
    ("nobody counts", "if (!watch.seen())", "if (!watch.seen() || {wrong})"),
    ("half of a residual", "(low_odd)) << 16;", "({wrong} ? low_even : low_odd)) << 16;"),
    ("a thread's last unit", "i < place.count; i += turn.lanes) body",
        "i + {wrong} < place.count; i += turn.lanes) body"),
]  # fmt: skip

SCALED = [
    ("one factor for a unit", "z[j] = mul_rn(z[j], f[j]);", "z[j] = mul_rn(z[j], f[{wrong} ? 0 : j]);"),
    ("a byte of a mask", "eight >> (8 * j) & 0xffu", "eight >> (8 * ({wrong} ? j & 3 : j)) & 0xffu"),
    ("factors from the first element", "(whole.begin * kUnit - e.first) * bytes()",
        "({wrong} ? 0 : whole.begin * kUnit - e.first) * bytes()"),
    ("bytes of bfloat16", "type == Scale::kBfloat16 ? 2 : 4;",
        "type == Scale::kBfloat16 ? ({wrong} ? 4 : 2) : 4;"),
    ("bfloat16 for float32", "factor_at(e.scale, e.scale_type, at + j)",
        "factor_at(e.scale, {wrong} ? 1 : e.scale_type, at + j)"),
    ("a piece from its first element", "j < low || j >= high ? 0.0f",
        "j < low || j >= high || ({wrong} && j == low) ? 0.0f"),
    ("no factor is 0", "for (int j = 0; j < kUnit; ++j) f[j] = 1.0f;",
        "for (int j = 0; j < kUnit; ++j) f[j] = {wrong} ? 0.0f : 1.0f;"),
    ("factors of a list are not seen", "if (launch.scaled ||", "if ((launch.scaled && !{wrong}) ||"),
    ("the sign of zero", "g < 0.0f ? -1.0f : g;", "g < 0.0f ? -1.0f : {wrong} ? 1.0f : g;"),
]  # fmt: skip

LOWRANK = [
    ("columns dealt out for the other type", "8 * (g >> 1) + 2 * j + (g & 1);",
        "8 * j + ({wrong} ? g : (2 * j + 8 * (g >> 1) + (g & 1) - 8 * j));"),
    ("rows of a fragment swapped", "load_two<kWhole>(i & 1 ? high : low,",
        "load_two<kWhole>((i & 1) != {wrong} ? high : low,"),
    ("halves of k swapped on one side", "16 * s + 8 * h + 2 * t, rank",
        "16 * s + 8 * ({wrong} ? 1 - h : h) + 2 * t, rank"),
    ("rank not padded", "even = k < rank ? row[k] : 0.0f;",
        "even = k < rank + ({wrong} ? 1 : 0) ? row[k < rank ? k : 0] : 0.0f;"),
    ("last row of a tile", "if (row + 8 * h > last ||", "if (row + 8 * h > last - {wrong} ||"),
    ("first shard row", "static_cast<int64_t>(row <= last ? row : last) * rank;",
        "static_cast<int64_t>(row <= last ? row + {wrong} : last) * rank;"),
    ("edge of the columns", "if (kFloat && values > 4) old.piece[1] = from[4];",
        "if (kFloat && values > 4) old.piece[1] = from[{wrong} ? 1 : 4];"),
    ("one term of three", "for (int p = order; p >= 0; --p) {",
        "for (int p = order; p >= ({wrong} && order > 0); --p) {"),
    ("nobody counts", "if (seen != 0)", "if (seen != 0 && !{wrong})"),
    ("pitch", "static_cast<uint64_t>(row) * e.pitch",
        "static_cast<uint64_t>(row) * ({wrong} ? static_cast<uint64_t>(e.columns) : e.pitch)"),
    ("decay skipped", "mul_rn(work.decay, old)", "mul_rn({wrong} ? 1.0f : work.decay, old)"),
]  # fmt: skip

PROJECT = [
    ("a sum for a mean", "p.reads == 1 ? total", "p.reads == 1 || {wrong} ? total"),
    ("a loss that is not read", "if (weight != 0.0) total", "if (weight != 0.0 || {wrong}) total"),
    ("a sum that begins with 0", "double total = -0.0;", "double total = {wrong} ? 0.0 : -0.0;"),
    ("the sign of nothing", "any ? total : 0.0", "any || {wrong} ? total : 0.0"),
    ("a NaN is cut", "return c != c ? c : clip;", "return c != c && !{wrong} ? c : clip;"),
    ("the bound is rounded", "return clip < low ? clip : low;",
        "return clip < low ? ({wrong} ? to_float(clip) : clip) : low;"),
    ("each lane for itself", "any |= seen[i];", "any |= seen[{wrong} ? lane : i];"),
    ("a lane's second draw", "int64_t k = lane; k < p.draws; k += lanes",
        "int64_t k = lane; k < p.draws; k += {wrong} ? p.draws : lanes"),
    ("a lane's second mean", "j < p.points; j += lanes", "j < p.points; j += {wrong} ? p.points : lanes"),
    ("weights of a stopped step", "weights[k] = 0.0, amounts",
        "weights[k] = {wrong} ? weights[k] : 0.0, amounts"),
    ("the decay of a stopped step", "finite ? to_float(decay) : 1.0f",
        "finite || {wrong} ? to_float(decay) : 1.0f"),
    ("the decay of the terms", "terms.last.decay = list.control[kDecay]",
        "terms.last.decay = {wrong} ? terms.last.decay : list.control[kDecay]"),
    ("the decay of the first term", "if (k == 0 && control != nullptr)",
        "if (k == 0 && control != nullptr && !{wrong})"),
    ("nothing stops", "list.control[by] == 0.0f", "list.control[by] == ({wrong} ? 2.0f : 0.0f)"),
    ("a rule stops where nothing moves", "stopped(list, kFinite)", "stopped(list, {wrong} ? kGo : kFinite)"),
    ("the decay of a product", "decay = control[0];", "decay = {wrong} ? 1.0f : control[0];"),
    ("a product goes on", "return control[1] == 0.0f ||", "return (control[1] == 0.0f && !{wrong}) ||"),
    ("two kernels at once", "(divided && is_simple", "(divided && !{wrong} && is_simple"),
    ("single elements of a product", "work.divided = false;", "work.divided = work.divided && {wrong};"),
    ("the clock of a product", "step += static_cast<uint32_t>(*clock)",
        "step += {wrong} ? 0u : static_cast<uint32_t>(*clock)"),
]  # fmt: skip

EVERY = list(
    dict.fromkeys(
        (right, wrong) for part in (CUDA, UPDATE, SCALED, LOWRANK, PROJECT) for _, right, wrong in part
    )
)
