// Depthwise convolution on the CPU: one input channel per group, any number of output channels. Lanes are either
// neighbouring pixels of one plane or neighbouring channels, whichever the operands' layout offers; both add up every
// sum in the same order, so the result's bits do not depend on the layout.
#pragma once
#include "conv2d_epilogue.h"
#include "conv2d_weights.h"

namespace pynn::cpu {

// The correlation of a forward pass (in_channels is 1) or of an input gradient (out_channels is 1), stored as E.
template <class T, class E>
void correlate_depthwise(const T* x, const Strides4& s, const Window& window, const T* w, const WeightView& view,
                         const Epilogue<E>& epilogue);

template <class T>
void depthwise_weight_gradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, const Window& window,
                               T* dw, T* dbias);

}  // namespace pynn::cpu
