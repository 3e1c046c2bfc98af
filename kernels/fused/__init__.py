"""Our Triton kernels, chosen by `model.kernel_backend = "triton"`. Nothing here is imported before such a call."""
