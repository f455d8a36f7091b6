"""The CUDA source of the fused loss, compiled when it is first asked for (`coursepack.kernels.nvrtc`).

One block of threads per row, one launch for loss and both gradients. Of T threads, thread t owns the classes
t, t + T, ...: what it writes for a class only it reads, but where a barrier stands between. Two rows of
floats are kept per block, in shared memory where they fit: one teacher's probabilities, and the mixture.
Formulas are those of `coursepack.kernels.analytic`, constants those of `coursepack.kernels.jit_loss`.

`DEVICE` is what only a GPU has; everything in `BODY` compiles as C++ for a CPU too, where tests run it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.kernels import call

if TYPE_CHECKING:
    import numpy as np

ENTRY = "soft_target_loss"
MOST_TEACHERS = 32
"""So many records fit into the 4 KiB that every kernel may be given as its argument."""
ARGUMENT_BYTES = call.CALL_BYTES + MOST_TEACHERS * call.TEACHER.itemsize
MOST_THREADS = 1024

DEVICE = r"""
#define SHARED_ROWS(name) extern __shared__ float name[]

__device__ float from_half(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ unsigned short to_half(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
"""

_DECODE = r"""
__device__ float from_bfloat16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

__device__ unsigned short to_bfloat16(float value)
{
    unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fc0;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ float half_at(Integer start, Integer place)
{
    return from_half(((const unsigned short *)start)[place]);
}

// One element of a floating-point row.
__device__ float dense_at(Integer kind, Integer start, Integer place)
{
    if (kind == FLOAT32) return ((const float *)start)[place];
    const unsigned short bits = ((const unsigned short *)start)[place];
    return kind == FLOAT16 ? from_half(bits) : from_bfloat16(bits);
}

// NaN wins.
__device__ float larger(float a, float b) { return b > a || b != b ? b : a; }

struct Largest { static __device__ float of(float a, float b) { return larger(a, b); } };
struct Lowest { static __device__ int of(int a, int b) { return b < a ? b : a; } };
struct Sum { static __device__ double of(double a, double b) { return a + b; } };

// One value of all threads' values, the same in each. Passes two barriers.
template <class Operation, class T> __device__ T over_block(T value, double *partial)
{
    for (int step = 16; step > 0; step /= 2)
        value = Operation::of(value, __shfl_xor_sync(0xffffffffu, value, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = (T)partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = Operation::of(value, (T)partial[warp]);
    return value;
}

__device__ double float_at(Integer start, Integer place, double otherwise)
{
    return start ? ((const float *)start)[place] : otherwise;
}

template <class Record> __device__ double temperature_at(const Record &record, Integer n)
{
    return float_at(record.temperature, n * record.temperature_stride, record.fixed_temperature);
}

__device__ bool allowed(double temperature) { return temperature > 0 && temperature <= MAX_TEMPERATURE; }

__device__ double weight_at(const Call &call, Integer n, Integer k)
{
    if (!call.weights) return 1.0 / call.teachers;
    const Integer place = n * call.weights_row + k * call.weights_column;
    if (call.weights_bytes == 8) return ((const double *)call.weights)[place];
    return ((const float *)call.weights)[place];
}

// The label of a row; -1 where it is to be ignored, or there is none.
__device__ Integer label_at(const Call &call, Integer start, Integer n)
{
    if (!start) return -1;
    const Integer label = ((const Integer *)start)[n];
    return label == call.ignore_index ? -1 : label;
}

__device__ bool wrong_label(const Call &call, Integer start, Integer n)
{
    if (!start) return false;
    const Integer label = ((const Integer *)start)[n];
    return label != call.ignore_index && (label < 0 || label >= call.classes);
}

__device__ Integer class_id(const Teacher &teacher, Integer place)
{
    if (teacher.ids_bytes == 2) return ((const unsigned short *)teacher.ids)[place];
    return ((const unsigned *)teacher.ids)[place];
}

// Whether a row holds a value that is not allowed, as far as this thread looks. Logits are not looked at.
__device__ bool is_bad(const Arguments &given, Integer n, double row_weight)
{
    const Call &call = given.call;
    const double lam = float_at(call.lam, n, 1.0);
    bool bad = wrong_label(call, call.labels, n) || wrong_label(call, call.second, n);
    bad = bad || !allowed(temperature_at(call, n)) || !(lam >= 0 && lam <= 1) || row_weight != row_weight;
    for (Integer k = 0; k < call.teachers; ++k) {
        const Teacher &teacher = given.teacher[k];
        bad = bad || !allowed(temperature_at(teacher, n)) || !(weight_at(call, n, k) >= 0);
        if (teacher.kind != TOPK) continue;
        for (Integer i = threadIdx.x; i < teacher.kept; i += blockDim.x)
            bad = bad || class_id(teacher, n * teacher.ids_stride + i) >= call.classes;
    }
    return bad;
}

__device__ double inverse_of(double temperature)
{
    const double inverse = 1 / temperature;
    return inverse < LARGEST ? inverse : LARGEST;
}

__device__ float factor_of(double inverse)
{
    const double factor = inverse * LOG2_E;
    return (float)(factor < LARGEST ? factor : LARGEST);
}

// The logit of every class that a top-k row dropped, as `TopKRows.tail_logit` has it.
__device__ float dropped_logit(
    const Call &call, const Teacher &teacher, Integer n, float top, double temperature)
{
    const Integer dropped = call.classes - teacher.kept, tail = n * teacher.tail_stride;
    if (dropped == 0) return top;
    const float inverse = (float)(1 / temperature), limit = logf((float)dropped);
    const float knots[5] = {0.0f, 0.125f, 0.25f, 0.5f, 1.0f};
    const int segment = inverse <= knots[1] ? 0 : inverse <= knots[2] ? 1 : inverse <= knots[3] ? 2 : 3;
    const float start = segment ? 0.0625f * (1 << segment) : 0.0f, stop = 0.125f * (1 << segment);
    const float low = segment ? half_at(teacher.tail, tail + 4 - segment) : limit;
    const float high = half_at(teacher.tail, tail + 3 - segment);
    const float mass = low + (high - low) * ((inverse - start) / (stop - start));
    const float excess = (mass - limit) / inverse;
    return top + (excess > 0 ? 0.0f : excess);
}
"""

_TEACHER = r"""
#define FOR_OWN(c, count) for (Integer c = threadIdx.x; c < (count); c += blockDim.x)

// Decode a row; its largest value. A barrier is needed before others than the owner read a class.
__device__ float read_row(const Call &call, const Teacher &teacher, Integer n, float *out, double *partial)
{
    float top = -INFINITE;
    const Integer start = n * teacher.stride;
    if (teacher.kind == TOPK) {
        FOR_OWN(i, teacher.kept) top = larger(top, half_at(teacher.values, start + i));
        top = over_block<Largest>(top, partial);
        const float rest = dropped_logit(call, teacher, n, top, temperature_at(teacher, n));
        FOR_OWN(c, call.classes) out[c] = rest;
        __syncthreads();
        FOR_OWN(i, teacher.kept)
            out[class_id(teacher, n * teacher.ids_stride + i)] = half_at(teacher.values, start + i);
        return top;
    }
    if (teacher.kind == INT8) {
        const unsigned char *row = (const unsigned char *)teacher.values + start;
        const float scale = half_at(teacher.affine, n * teacher.affine_stride);
        const float minimum = half_at(teacher.affine, n * teacher.affine_stride + 1);
        FOR_OWN(c, call.classes) {
            const float value = minimum + scale * row[c];
            out[c] = value;
            top = larger(top, value);
        }
    } else {
        FOR_OWN(c, call.classes) {
            const float value = dense_at(teacher.kind, teacher.values, start + c);
            out[c] = value;
            top = larger(top, value);
        }
    }
    return over_block<Largest>(top, partial);
}

// Probabilities of a teacher's row, softened and adjusted, up to a factor; their sum.
__device__ double teacher_exponentials(
    const Call &call, const Teacher &teacher, Integer n, Integer label, float *out, double *partial)
{
    const float top = read_row(call, teacher, n, out, partial);
    const float factor = factor_of(inverse_of(temperature_at(teacher, n)));
    __syncthreads();
    const bool adjusts = teacher.adjustment != NONE && label >= 0;
    const float at_label = adjusts ? out[label] : top;
    if (adjusts) __syncthreads();  // all have read it
    if (at_label < top) {
        if (teacher.adjustment == SMOOTH) {
            const float each = (float)(call.smoothing / call.classes), more = (float)(1 - call.smoothing);
            FOR_OWN(c, call.classes) out[c] = c == label ? each + more : each;
            return 1.0 + (top - top);  // NaN for a row with an infinity
        }
        // Swapping two logits swaps their probabilities. Ties of the top go to the lowest class.
        int first = (int)call.classes;
        FOR_OWN(c, call.classes) if (out[c] == top && c < first) first = (int)c;
        first = over_block<Lowest>(first, partial);
        if (threadIdx.x == 0) {
            out[label] = top;
            out[first] = at_label;
        }
        __syncthreads();
    }
    float part = 0;
    FOR_OWN(c, call.classes) {
        const float value = exp2f((out[c] - top) * factor);
        out[c] = value;
        part += value;
    }
    return over_block<Sum>((double)part, partial);
}
"""

_ROW = r"""
// `p log(p / q) + q - p`, as `jit_math.divergence_term` has it; q where p is 0, whatever `log_q`.
__device__ float divergence_term(float p, float q, float log_q)
{
    if (p == 0) return q;
    const float d = logf(p > TINY ? p : TINY) - log_q;
    float series = 0.0013997796375501926f;
    series = series * d - 0.008395562518803067f;
    series = series * d + 0.041665400964186826f;
    series = series * d - 0.16666277278692196f;
    series = series * d + 0.5f;
    return fabsf(d) < 0.5f ? p * d * d * series : p * d + (q - p);
}

__device__ void write_grad(const Call &call, Integer place, float value)
{
    if (call.student_kind == FLOAT32) ((float *)call.grad)[place] = value;
    else if (call.student_kind == FLOAT16) ((unsigned short *)call.grad)[place] = to_half(value);
    else ((unsigned short *)call.grad)[place] = to_bfloat16(value);
}

// A row of one value, without looking at anything.
__device__ void write_row(const Call &call, Integer n, float value)
{
    if (threadIdx.x == 0) ((float *)call.loss)[n] = value;
    if (call.grad) FOR_OWN(c, call.classes) write_grad(call, n * call.classes + c, value);
    float *grad_weights = (float *)call.grad_weights + n * call.teachers;
    if (call.grad_weights) FOR_OWN(k, call.teachers) grad_weights[k] = value;
}

// The student's row: log q is `(z - top) inverse - log_total`.
struct Student {
    Integer kind, start, place;
    float top, factor, inverse, log_total, scale;

    __device__ float logit(Integer c) const { return dense_at(kind, start, place + c) - top; }
    __device__ float prob(float logit) const { return exp2f(logit * factor) * scale; }
    __device__ float log_prob(float logit) const { return logit * inverse - log_total; }
};

__device__ Student read_student(const Call &call, Integer n, double temperature, double *partial)
{
    Student student = {call.student_kind, call.student, n * call.student_stride};
    float top = -INFINITE;
    FOR_OWN(c, call.classes) top = larger(top, dense_at(student.kind, student.start, student.place + c));
    student.top = over_block<Largest>(top, partial);
    const double inverse = inverse_of(temperature);
    student.inverse = (float)inverse;
    student.factor = factor_of(inverse);
    float part = 0;
    FOR_OWN(c, call.classes) part += exp2f(student.logit(c) * student.factor);
    const double total = over_block<Sum>((double)part, partial);
    student.log_total = (float)log(total);
    student.scale = (float)(1 / total);
    return student;
}

// The teachers' mixture into `mixture`: brought to a sum of one, or with their weights where divergences are
// summed. Gives the sum of these divergences, and writes their gradients to the weights.
__device__ double mix(
    const Arguments &given, Integer n, Integer label, const Student &student, double weight_sum,
    double squared, float *probs, float *mixture, double *partial)
{
    const Call &call = given.call;
    double result = 0;
    FOR_OWN(c, call.classes) mixture[c] = 0;
    for (Integer k = 0; k < call.teachers; ++k) {
        const double weight = weight_at(call, n, k);
        const double size = teacher_exponentials(call, given.teacher[k], n, label, probs, partial);
        if (call.combine == MIXTURE) {
            const float share = (float)((weight_sum > 0 ? weight / weight_sum : 0.0) / size);
            FOR_OWN(c, call.classes) mixture[c] += share * probs[c];
            continue;
        }
        const float scale = (float)(1 / size);
        float part = 0;
        FOR_OWN(c, call.classes) {
            const float p = scale * probs[c], logit = student.logit(c);
            part += divergence_term(p, student.prob(logit), student.log_prob(logit));
            mixture[c] += (float)weight * p;
        }
        const double each = over_block<Sum>((double)part, partial);
        if (weight != 0) result += weight * each;
        if (call.grad_weights && threadIdx.x == 0)
            ((float *)call.grad_weights)[n * call.teachers + k] = (float)(squared * each);
    }
    return result;
}

// The mixture's gradients to the weights; `slopes` are `log p - log q + 1`.
__device__ void weight_gradients(
    const Arguments &given, Integer n, Integer label, double squared, float *probs, const float *slopes,
    double *partial)
{
    const Call &call = given.call;
    for (Integer k = 0; k < call.teachers; ++k) {
        const double size = teacher_exponentials(call, given.teacher[k], n, label, probs, partial);
        float part = 0;
        FOR_OWN(c, call.classes) part += probs[c] == 0 ? 0 : probs[c] * slopes[c];
        const double products = over_block<Sum>((double)part, partial);
        if (threadIdx.x == 0)
            ((float *)call.grad_weights)[n * call.teachers + k] = (float)(squared * products / size);
    }
}

__device__ void one_row(const Arguments &given, Integer n, float *probs, float *mixture, double *partial)
{
    const Call &call = given.call;
    const double row_weight = float_at(call.row_weight, n, 1.0);
    if (row_weight == 0) return write_row(call, n, 0);
    if (__syncthreads_or(is_bad(given, n, row_weight))) return write_row(call, n, NOT_A_NUMBER);

    const bool soft = call.soft_weight != 0, hard = call.hard_weight != 0 && call.labels;
    const bool mixes = call.combine == MIXTURE;
    const Integer first = label_at(call, call.labels, n), second = label_at(call, call.second, n);
    const Integer label = call.second ? -1 : first;
    const double temperature = temperature_at(call, n);
    const double factor = row_weight * call.soft_weight, squared = factor * temperature * temperature;
    const float slope = (float)(factor * temperature);
    double value = 0, weight_sum = 0;
    for (Integer k = 0; k < call.teachers; ++k) weight_sum += weight_at(call, n, k);
    const float sum = (float)weight_sum;
    Student student = {}, untempered = {};
    if (soft) {
        student = read_student(call, n, temperature, partial);
        value = squared * mix(given, n, label, student, weight_sum, squared, probs, mixture, partial);
    }
    float taken_first = 0, taken_second = 0, taken = 0;
    if (hard) {
        untempered = read_student(call, n, 1.0, partial);
        const double hard_factor = row_weight * call.hard_weight, lam = float_at(call.lam, n, 1.0);
        const double shares[2] = {first < 0 ? 0.0 : lam, second < 0 ? 0.0 : 1 - lam};
        double cross_entropy = 0;
        if (shares[0] != 0) cross_entropy -= shares[0] * untempered.log_prob(untempered.logit(first));
        if (shares[1] != 0) cross_entropy -= shares[1] * untempered.log_prob(untempered.logit(second));
        value += hard_factor * cross_entropy;
        taken_first = (float)(hard_factor * shares[0]);
        taken_second = (float)(hard_factor * shares[1]);
        taken = (float)(hard_factor * (shares[0] + shares[1]));
    }
    float part = 0;
    FOR_OWN(c, call.classes) {
        float gradient = 0;
        if (soft) {
            const float logit = student.logit(c), q = student.prob(logit), log_q = student.log_prob(logit);
            const float p = mixture[c];
            gradient = mixes ? slope * sum * (q - p) : slope * (sum * q - p);
            if (mixes) {
                part += divergence_term(p, q, log_q);
                const float whole = sum * p;
                mixture[c] = logf(whole > TINY ? whole : TINY) - log_q + (whole >= TINY ? 1.0f : 0.0f);
            }
        }
        if (hard) gradient += taken * untempered.prob(untempered.logit(c));
        if (c == first) gradient -= taken_first;
        if (c == second) gradient -= taken_second;
        if (call.grad) write_grad(call, n * call.classes + c, gradient);
    }
    if (soft && mixes) {
        const double each = over_block<Sum>((double)part, partial);
        value += squared * (weight_sum * each + (weight_sum > 0 ? weight_sum * log(weight_sum) : 0.0));
        if (call.grad_weights) weight_gradients(given, n, label, squared, probs, mixture, partial);
    }
    if (!soft && call.grad_weights)
        FOR_OWN(k, call.teachers) ((float *)call.grad_weights)[n * call.teachers + k] = 0;
    if (threadIdx.x == 0) ((float *)call.loss)[n] = (float)value;
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    soft_target_loss(const __grid_constant__ Arguments given)
{
    SHARED_ROWS(shared);
    __shared__ double partial[32];
    const Call &call = given.call;
    float *probs = call.scratch ? (float *)call.scratch + blockIdx.x * call.scratch_stride : shared;
    for (Integer n = blockIdx.x; n < call.rows; n += gridDim.x)
        one_row(given, n, probs, probs + call.classes, partial);
}
"""


def _record(name: str, record: np.dtype[Any]) -> str:
    """A struct of 64-bit fields, as `call` packs them."""
    assert record.names is not None
    kinds = {"i": "Integer", "f": "double"}
    fields = "".join(f"    {kinds[record[field].kind]} {field};\n" for field in record.names)
    return f"struct {name} {{\n{fields}}};\n"


_CONSTANTS: dict[str, int | str] = {
    "FLOAT32": call.FLOAT32,
    "FLOAT16": call.FLOAT16,
    "INT8": call.INT8,
    "TOPK": call.TOPK,
    "NONE": call.NONE,
    "SMOOTH": call.SMOOTH,
    "MIXTURE": 0,
    "MOST_THREADS": MOST_THREADS,
    "MAX_TEMPERATURE": "100.0",
    "LARGEST": "1.0e30",
    "LOG2_E": "1.4426950408889634",
    "TINY": "1.17549435e-38f",
    "INFINITE": "__uint_as_float(0x7f800000u)",
    "NOT_A_NUMBER": "__uint_as_float(0x7fc00000u)",
}

BODY = "\n".join(
    [
        "typedef long long Integer;",
        *(f"#define {name} {value}" for name, value in _CONSTANTS.items()),
        _record("Call", call.CALL),
        _record("Teacher", call.TEACHER),
        f"struct Arguments {{ Call call; Teacher teacher[{MOST_TEACHERS}]; }};",
        _DECODE,
        _TEACHER,
        _ROW,
    ]
)
SOURCE = DEVICE + BODY
