"""Kernels as an H200 names them, by name alone, by the operation that launched them and by label."""

import pytest

from torchlinearmoe.benchmark.categories import CATEGORIES, categorise

GROUPED = (
    "_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel13GemmUniversalINS5_17Gr"
)
PREPARE = (
    "void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t, cutlass::bfloat16_t, cutlass::bfloat16_t"
)
FLASH = "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8, 2, 4"
SPLIT_K = (
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false, float, __nv"
)
SGEMM = "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nt_align1>(cutlass_80_simt_sgemm_128x32_8x5_nt_align1::"
GEMV = "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 2, 2, false, false, cublasGemvParamsEx<i"
ADD = "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*"
RADIX = "void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::detail::radix"
GATHERED = (
    "void at::native::_scatter_gather_elementwise_kernel<128, 8, at::native::_cuda_scatter_gather_internal_kernel<t"
)
SUMMED = (
    "void at::native::(anonymous namespace)::sum_and_scatter<c10::BFloat16, long>(long const*, c10::BFloat16*, long"
)


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("matmul", "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT"),
        ("matmul", "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x128x8_stage3_warpsize1x4x1_ffma_aligna4_alignc4"),
        ("matmul", GROUPED),
        ("matmul", PREPARE),
        ("matmul", SPLIT_K),
        ("matmul", SGEMM),
        ("matmul", GEMV),
        ("attention", FLASH),
        ("recurrence", "convolve_forward"),
        (
            "moe",
            "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(at::cuda::detail::TensorInfo<float",
        ),
        (
            "moe",
            "void at::native::bitonicSortKVInPlace<2, -1, 16, 16, float, long, at::native::GTOp<float, true>, unsigned",
        ),
        ("moe", RADIX),
        ("moe", GATHERED),
        ("moe", "triton_poi_fused_floor_divide_index_select_5"),
        *(("moe", name) for name in ("sort_count", "sort_scatter", "scatter_tokens", "gather_sum", "gather_weighted")),
        ("head", "cross_entropy_rows"),
        ("head", "triton_red_fused__to_copy_arange_clamp_eq_exp_logsumexp_mul_ne_sub_unsqueeze_0"),
        ("optimizer", "_adamw"),
        ("optimizer", "_square_sum"),
        (
            "optimizer",
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor",
        ),
        ("sharding", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
        ("sharding", "void at::native::(anonymous namespace)::split_with_sizes_copy_out_contiguous_no_cast_kernel"),
        ("other", "triton_poi_fused_cat_mul_silu_silu_backward_split_0"),
        ("other", "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0"),
        ("other", ADD),
        ("other", "Memset (Device)"),
    ],
)
def test_a_name_alone_tells(category: str, name: str):
    assert category in CATEGORIES
    assert categorise(name) == category
    assert categorise(name, (), "layer") == category


def test_the_label_tells_what_a_name_does_not():
    scan = (
        "triton_red_fused__to_copy_clamp_clone_exp_mul_neg_rsub_scalar_tensor_sigmoid_silu_sub_sum_transpose_unsqueeze_"
    )
    assert categorise(scan) == "other"
    for label in ("recurrence", "attention", "moe"):
        assert categorise(scan, ("CompiledFunctionBackward",), label) == label
    assert categorise("Memcpy DtoD (Device -> Device)", ("aten::copy_",), "recurrence") == "recurrence"


def test_the_head_and_the_optimizer_own_their_products_and_sums():
    product = "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT"
    assert categorise(product, ("aten::mm",), "head") == "head"
    assert categorise(ADD, ("aten::add_",), "optimizer") == "optimizer"
    assert categorise(ADD, ("aten::add_", "torch::autograd::AccumulateGrad")) == "optimizer"
    assert categorise(ADD, ("Optimizer.step#AdamW.step",)) == "optimizer"


def test_only_batched_products_belong_to_the_mixer_around_them():
    for label in ("recurrence", "attention"):
        assert categorise(SGEMM, ("aten::bmm", "CompiledFunction"), label) == label
        assert categorise(SGEMM, ("aten::mm", "CompiledFunction"), label) == "matmul"
    assert categorise(GROUPED, ("aten::_grouped_mm", "torchlinearmoe::grouped_mm"), "layer") == "matmul"
    assert categorise(SGEMM, ("aten::bmm",), "moe") == "matmul"


def test_what_a_product_launches_beside_itself_belongs_to_it():
    assert categorise("Memset (Device)", ("aten::mm", "CompiledFunction"), "recurrence") == "matmul"
    assert categorise("Memset (Device)", ("aten::zero_", "CompiledFunction"), "recurrence") == "recurrence"


def test_embeddings_are_no_movement_to_experts():
    assert categorise(SUMMED) == "moe"
    assert categorise(SUMMED, ("aten::embedding_dense_backward", "EmbeddingBackward0"), "layer") == "other"


def test_copies_between_shards_are_told_by_the_range_around_them():
    around = ("aten::copy_", "FSDP::all_gather_copy_in", "FSDP::all_gather")
    assert categorise("Memcpy DtoD (Device -> Device)", around, "recurrence") == "sharding"
    assert categorise("c10d::allreduce_", ("c10d::allreduce_",)) == "sharding"
