// Diffusion ops: validation, allocation, launch. See csrc/include/diffusion.h for what the kernels compute.
#include "diffusion.h"

#include <cmath>

#include "library.h"

namespace pynn {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Everything the ops of this file share: the shape, and contiguous views of the index, table and noise operands.
struct Common {
  const char* op;
  bool launches = true;  // otherwise this is validation alone, and nothing is copied
  DiffusionShape shape{};
  Tensor t, table;
  OptionalTensor s, noise, key;

  template <class T>
  DiffusionNoise<T> noise_source() const {
    return {noise ? pointer<T>(*noise) : nullptr, key ? pointer<int64_t>(*key) : nullptr};
  }
  const int64_t* t_data() const { return pointer<int64_t>(t); }
  const int64_t* s_data() const { return s ? pointer<int64_t>(*s) : nullptr; }
  const double* table_data() const { return pointer<double>(table); }
  bool empty() const { return shape.batch == 0 || shape.inner == 0; }
  Tensor contiguous(const Tensor& tensor) const { return launches ? torch::stable::contiguous(tensor) : tensor; }
};

void set_sample_shape(Common& c, const Tensor& x, const char* argument) {
  check_floating(c.op, argument, x);
  PYNN_CHECK(x.dim() >= 1, c.op, ": expected ", argument,
             " with a batch dimension (B, ...), got a 0-dimensional tensor");
  c.shape.batch = x.size(0);
  c.shape.inner = 1;
  for (int64_t d = 1; d < x.dim(); ++d) c.shape.inner = checked_multiply(c.op, c.shape.inner, x.size(d));
}

// Timesteps: int64, one or one per sample, each in [low, timesteps). Values on a GPU are not read here: that would
// stall the stream; kernels there write NaN for a bad index instead.
Tensor check_index(const Common& c, const char* argument, const Tensor& t, const Tensor& x, int64_t low) {
  PYNN_CHECK(t.scalar_type() == ScalarType::Long, c.op, ": expected ", argument, " to be int64, got ",
             name_of(t.scalar_type()));
  check_same_device(c.op, argument, t, "x", x);
  PYNN_CHECK(t.dim() <= 1 && (t.numel() == 1 || t.numel() == c.shape.batch), c.op, ": expected ", argument,
             " of shape [] or [1] or [", c.shape.batch, "] (one timestep per sample), got ", shape_of(t));
  if (!t.is_cpu()) return c.contiguous(t);
  Tensor contiguous = torch::stable::contiguous(t);
  for (int64_t i = 0; i < contiguous.numel(); ++i) {
    const int64_t value = pointer<int64_t>(contiguous)[i];
    PYNN_CHECK(value >= low && value < c.shape.timesteps, c.op, ": expected ", argument, " in [", low, ", ",
               c.shape.timesteps - 1, "], got ", value);
  }
  return contiguous;
}

void set_table(Common& c, const Tensor& table, const Tensor& x, int64_t columns, int64_t extra_rows) {
  PYNN_CHECK(table.scalar_type() == ScalarType::Double, c.op, ": expected table to be float64, got ",
             name_of(table.scalar_type()));
  check_same_device(c.op, "table", table, "x", x);
  PYNN_CHECK(table.dim() == 2 && table.size(1) == columns && table.size(0) > extra_rows, c.op,
             ": expected table of shape [timesteps", extra_rows ? " + 1" : "", ", ", columns, "], got ",
             shape_of(table));
  c.shape.timesteps = table.size(0) - extra_rows;
  c.table = c.contiguous(table);
}

void set_timesteps(Common& c, const Tensor& t, const Tensor& x) {
  c.t = check_index(c, "t", t, x, 0);
  c.shape.t_count = c.t.numel();
}

Tensor check_key(Common& c, const Tensor& key, const Tensor& x) {
  PYNN_CHECK(key.scalar_type() == ScalarType::Long, c.op, ": expected key to be int64 (seed, offset), got ",
             name_of(key.scalar_type()));
  check_same_device(c.op, "key", key, "x", x);
  const bool one = key.dim() == 1 && key.size(0) == 2;
  const bool per_sample = key.dim() == 2 && key.size(0) == c.shape.batch && key.size(1) == 2;
  PYNN_CHECK(one || per_sample, c.op, ": expected key of shape [2] or [", c.shape.batch, ", 2], got ", shape_of(key));
  c.shape.key_count = one ? 1 : c.shape.batch;
  return c.contiguous(key);
}

void set_noise(Common& c, const OptionalTensor& noise, const OptionalTensor& key, const Tensor& x) {
  PYNN_CHECK(noise.has_value() != key.has_value(), c.op, ": expected exactly one of noise and key, got ",
             noise ? "both" : "neither");
  if (key) {
    c.key = check_key(c, *key, x);
    return;
  }
  check_same_dtype(c.op, "noise", *noise, "x", x);
  check_same_device(c.op, "noise", *noise, "x", x);
  check_same_shape(c.op, "noise", *noise, "x", x);
  c.noise = c.contiguous(*noise);
}

// An operand that must look like x.
Tensor like(const Common& c, const char* argument, const Tensor& tensor, const char* x_name, const Tensor& x) {
  check_same_dtype(c.op, argument, tensor, x_name, x);
  check_same_device(c.op, argument, tensor, x_name, x);
  check_same_shape(c.op, argument, tensor, x_name, x);
  return c.contiguous(tensor);
}

Tensor contiguous_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }
Tensor none_like(const Tensor& x) {
  const int64_t zero = 0;
  return torch::stable::new_empty(x, Sizes(&zero, 1));
}

Common normal_operands(Common c, const Tensor& like, const Tensor& key) {
  set_sample_shape(c, like, "like");
  c.key = check_key(c, key, like);
  return c;
}

Tensor normal(const Tensor& like, const Tensor& key) {
  const Common c = normal_operands({.op = "normal"}, like, key);
  Tensor y = contiguous_like(like);
  if (c.empty()) return y;
  dispatch_floating(c.op, y.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::normal(mutable_pointer<T>(y), pointer<int64_t>(*c.key), c.shape, current_stream(y));
  });
  return y;
}

Common jump_operands(Common c, const Tensor& x, const Tensor& t, const OptionalTensor& s, const Tensor& table) {
  set_sample_shape(c, x, "x");
  set_table(c, table, x, kForwardColumns, 1);
  set_timesteps(c, t, x);
  if (!s) return c;
  c.s = check_index(c, "s", *s, x, -1);
  PYNN_CHECK(c.s->numel() == c.t.numel(), c.op, ": expected s and t with the same number of timesteps, got ",
             c.s->numel(), " and ", c.t.numel());
  if (!t.is_cpu()) return c;
  for (int64_t i = 0; i < c.t.numel(); ++i)
    PYNN_CHECK(c.s_data()[i] < c.t_data()[i], c.op, ": expected s < t, got s = ", c.s_data()[i],
               ", t = ", c.t_data()[i]);
  return c;
}

std::tuple<Tensor, Tensor> forward_jump_fwd(const Tensor& x_, const Tensor& t, const OptionalTensor& s,
                                            const Tensor& table, const OptionalTensor& noise, const OptionalTensor& key,
                                            bool return_noise) {
  Common c = jump_operands({.op = "forward_jump"}, x_, t, s, table);
  set_noise(c, noise, key, x_);
  const Tensor x = torch::stable::contiguous(x_);
  Tensor y = contiguous_like(x), noise_out = return_noise ? contiguous_like(x) : none_like(x);
  if (c.empty()) return {y, noise_out};
  dispatch_floating(c.op, x.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::forward_jump_fwd(
        mutable_pointer<T>(y), return_noise ? mutable_pointer<T>(noise_out) : nullptr, pointer<T>(x), c.t_data(),
        c.s_data(), c.table_data(), c.noise_source<T>(), c.shape, current_stream(x));
  });
  return {y, noise_out};
}

Tensor forward_jump_bwd(const Tensor& dy_, const Tensor& t, const OptionalTensor& s, const Tensor& table,
                        bool of_noise) {
  const Common c = jump_operands({.op = "forward_jump_bwd"}, dy_, t, s, table);
  const Tensor dy = torch::stable::contiguous(dy_);
  Tensor dx = contiguous_like(dy);
  if (c.empty()) return dx;
  dispatch_floating(c.op, dy.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::forward_jump_bwd(mutable_pointer<T>(dx), pointer<T>(dy), c.t_data(), c.s_data(),
                                           c.table_data(), of_noise, c.shape, current_stream(dy));
  });
  return dx;
}

ReverseClip check_clip(const char* op, const std::optional<double>& low, const std::optional<double>& high) {
  PYNN_CHECK(low.has_value() == high.has_value(), op, ": expected both clip bounds or none");
  if (!low) return {false, 0, 0};
  PYNN_CHECK(*low <= *high, op, ": expected clip_low <= clip_high, got ", *low, " and ", *high);
  return {true, *low, *high};
}

struct Reverse {
  Common c;
  Tensor x, output;
  OptionalTensor variance;
  ReverseClip clip;
};

Reverse reverse_operands(const Common& common, const Tensor& x, const Tensor& output, const OptionalTensor& variance,
                         const Tensor& t, const Tensor& table, const std::optional<double>& clip_low,
                         const std::optional<double>& clip_high, const OptionalTensor& noise,
                         const OptionalTensor& key) {
  Reverse r{.c = common};
  set_sample_shape(r.c, x, "x");
  set_table(r.c, table, x, kReverseColumns, 0);
  set_timesteps(r.c, t, x);
  r.output = like(r.c, "output", output, "x", x);
  if (variance) r.variance = like(r.c, "variance", *variance, "x", x);
  set_noise(r.c, noise, key, x);
  r.clip = check_clip(r.c.op, clip_low, clip_high);
  r.x = r.c.contiguous(x);
  return r;
}

std::tuple<Tensor, Tensor> reverse_step_fwd(const Tensor& x, const Tensor& output, const OptionalTensor& variance,
                                            const Tensor& t, const Tensor& table, std::optional<double> clip_low,
                                            std::optional<double> clip_high, const OptionalTensor& noise,
                                            const OptionalTensor& key, bool return_x0) {
  const Reverse r =
      reverse_operands({.op = "reverse_step"}, x, output, variance, t, table, clip_low, clip_high, noise, key);
  const Common& c = r.c;
  Tensor y = contiguous_like(r.x), x0 = return_x0 ? contiguous_like(r.x) : none_like(r.x);
  if (c.empty()) return {y, x0};
  dispatch_floating(c.op, r.x.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::reverse_step_fwd(mutable_pointer<T>(y), return_x0 ? mutable_pointer<T>(x0) : nullptr,
                                           pointer<T>(r.x), pointer<T>(r.output),
                                           r.variance ? pointer<T>(*r.variance) : nullptr, c.t_data(), c.table_data(),
                                           r.clip, c.noise_source<T>(), c.shape, current_stream(r.x));
  });
  return {y, x0};
}

std::tuple<Tensor, Tensor, Tensor> reverse_step_bwd(const Tensor& dy_, const Tensor& x, const Tensor& output,
                                                    const OptionalTensor& variance, const Tensor& t,
                                                    const Tensor& table, std::optional<double> clip_low,
                                                    std::optional<double> clip_high, const OptionalTensor& noise,
                                                    const OptionalTensor& key) {
  const Reverse r =
      reverse_operands({.op = "reverse_step_bwd"}, x, output, variance, t, table, clip_low, clip_high, noise, key);
  const Common& c = r.c;
  const Tensor dy = like(c, "grad_output", dy_, "x", x);
  Tensor dx = contiguous_like(r.x), doutput = contiguous_like(r.x),
         dvariance = r.variance ? contiguous_like(r.x) : none_like(r.x);
  if (c.empty()) return {dx, doutput, dvariance};
  dispatch_floating(c.op, r.x.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::reverse_step_bwd(
        mutable_pointer<T>(dx), mutable_pointer<T>(doutput), r.variance ? mutable_pointer<T>(dvariance) : nullptr,
        pointer<T>(dy), pointer<T>(r.x), pointer<T>(r.output), r.variance ? pointer<T>(*r.variance) : nullptr,
        c.t_data(), c.table_data(), r.clip, c.noise_source<T>(), c.shape, current_stream(r.x));
  });
  return {dx, doutput, dvariance};
}

struct Loss {
  Common c;
  Tensor output, x0;
};

Loss loss_operands(const Common& common, const Tensor& output, const Tensor& x0, const Tensor& t, const Tensor& table,
                   const OptionalTensor& noise, const OptionalTensor& key) {
  Loss l{.c = common};
  set_sample_shape(l.c, output, "output");
  set_table(l.c, table, output, kLossColumns, 0);
  set_timesteps(l.c, t, output);
  l.x0 = like(l.c, "x0", x0, "output", output);
  set_noise(l.c, noise, key, output);
  l.output = l.c.contiguous(output);
  return l;
}

ScalarType accumulate_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The gradient of the losses, contiguous.
Tensor loss_gradient(const Common& c, const Tensor& dloss, const Tensor& output) {
  check_shape(c.op, "grad_output", dloss, {c.shape.batch});
  check_same_device(c.op, "grad_output", dloss, "output", output);
  PYNN_CHECK(dloss.scalar_type() == accumulate_dtype(output), c.op, ": expected grad_output to be ",
             name_of(accumulate_dtype(output)), ", got ", name_of(dloss.scalar_type()));
  return c.contiguous(dloss);
}

Tensor diffusion_loss_fwd(const Tensor& output, const Tensor& x0, const Tensor& t, const Tensor& table,
                          const OptionalTensor& noise, const OptionalTensor& key) {
  const Loss l = loss_operands({.op = "diffusion_loss"}, output, x0, t, table, noise, key);
  const Common& c = l.c;
  Tensor loss = torch::stable::new_empty(output, Sizes(&c.shape.batch, 1), accumulate_dtype(output));
  if (c.empty()) return torch::stable::fill_(loss, NAN);  // the mean of nothing
  const int64_t sums = launch::loss_partial_sums(c.shape);
  Tensor partial = torch::stable::new_empty(output, Sizes(&sums, 1), ScalarType::Double);
  dispatch_floating(c.op, output.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::loss_fwd(mutable_pointer<accumulate_t<T>>(loss), mutable_pointer<double>(partial),
                                   pointer<T>(l.output), pointer<T>(l.x0), c.t_data(), c.table_data(),
                                   c.noise_source<T>(), c.shape, current_stream(output));
  });
  return loss;
}

std::tuple<Tensor, Tensor> diffusion_loss_bwd(const Tensor& dloss_, const Tensor& output, const Tensor& x0,
                                              const Tensor& t, const Tensor& table, const OptionalTensor& noise,
                                              const OptionalTensor& key, bool need_x0) {
  const Loss l = loss_operands({.op = "diffusion_loss_bwd"}, output, x0, t, table, noise, key);
  const Common& c = l.c;
  const Tensor dloss = loss_gradient(c, dloss_, output);
  Tensor doutput = contiguous_like(l.output), dx0 = need_x0 ? contiguous_like(l.output) : none_like(l.output);
  if (c.empty()) return {doutput, dx0};
  dispatch_floating(c.op, output.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Diffusion<T>::loss_bwd(mutable_pointer<T>(doutput), need_x0 ? mutable_pointer<T>(dx0) : nullptr,
                                   pointer<accumulate_t<T>>(dloss), pointer<T>(l.output), pointer<T>(l.x0), c.t_data(),
                                   c.table_data(), c.noise_source<T>(), c.shape, current_stream(output));
  });
  return {doutput, dx0};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("forward_jump_fwd", TORCH_BOX(&forward_jump_fwd));
  m.impl("forward_jump_bwd", TORCH_BOX(&forward_jump_bwd));
  m.impl("reverse_step_fwd", TORCH_BOX(&reverse_step_fwd));
  m.impl("reverse_step_bwd", TORCH_BOX(&reverse_step_bwd));
  m.impl("diffusion_loss_fwd", TORCH_BOX(&diffusion_loss_fwd));
  m.impl("diffusion_loss_bwd", TORCH_BOX(&diffusion_loss_bwd));
}

#ifdef PYNN_CHECKS
namespace {

Common check_only(const char* op) { return {.op = op, .launches = false}; }

void normal_check(const Tensor& like, const Tensor& key) { normal_operands(check_only("normal"), like, key); }

void forward_jump_fwd_check(const Tensor& x, const Tensor& t, const OptionalTensor& s, const Tensor& table,
                            const OptionalTensor& noise, const OptionalTensor& key, bool) {
  Common c = jump_operands(check_only("forward_jump"), x, t, s, table);
  set_noise(c, noise, key, x);
}

void forward_jump_bwd_check(const Tensor& dy, const Tensor& t, const OptionalTensor& s, const Tensor& table, bool) {
  jump_operands(check_only("forward_jump_bwd"), dy, t, s, table);
}

void reverse_step_fwd_check(const Tensor& x, const Tensor& output, const OptionalTensor& variance, const Tensor& t,
                            const Tensor& table, std::optional<double> clip_low, std::optional<double> clip_high,
                            const OptionalTensor& noise, const OptionalTensor& key, bool) {
  reverse_operands(check_only("reverse_step"), x, output, variance, t, table, clip_low, clip_high, noise, key);
}

void reverse_step_bwd_check(const Tensor& dy, const Tensor& x, const Tensor& output, const OptionalTensor& variance,
                            const Tensor& t, const Tensor& table, std::optional<double> clip_low,
                            std::optional<double> clip_high, const OptionalTensor& noise, const OptionalTensor& key) {
  const Reverse r =
      reverse_operands(check_only("reverse_step_bwd"), x, output, variance, t, table, clip_low, clip_high, noise, key);
  like(r.c, "grad_output", dy, "x", x);
}

void diffusion_loss_fwd_check(const Tensor& output, const Tensor& x0, const Tensor& t, const Tensor& table,
                              const OptionalTensor& noise, const OptionalTensor& key) {
  loss_operands(check_only("diffusion_loss"), output, x0, t, table, noise, key);
}

void diffusion_loss_bwd_check(const Tensor& dloss, const Tensor& output, const Tensor& x0, const Tensor& t,
                              const Tensor& table, const OptionalTensor& noise, const OptionalTensor& key, bool) {
  const Loss l = loss_operands(check_only("diffusion_loss_bwd"), output, x0, t, table, noise, key);
  loss_gradient(l.c, dloss, output);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("normal_check", TORCH_BOX(&normal_check));
  m.impl("forward_jump_fwd_check", TORCH_BOX(&forward_jump_fwd_check));
  m.impl("forward_jump_bwd_check", TORCH_BOX(&forward_jump_bwd_check));
  m.impl("reverse_step_fwd_check", TORCH_BOX(&reverse_step_fwd_check));
  m.impl("reverse_step_bwd_check", TORCH_BOX(&reverse_step_bwd_check));
  m.impl("diffusion_loss_fwd_check", TORCH_BOX(&diffusion_loss_fwd_check));
  m.impl("diffusion_loss_bwd_check", TORCH_BOX(&diffusion_loss_bwd_check));
}
#endif

}  // namespace pynn
