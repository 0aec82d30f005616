"""Attention over tiles by kernels: interpreted, equal to dense masked attention with its gradients; and
lowered for the accelerators that these tests do not have."""

import dataclasses
import functools
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType

from jbalance import attention
from jbalance.attention import EMPTY, _forward_tpu, tiles_gpu, tiles_tpu
from tests.support.attention_cases import (
    DISPATCH,
    KERNELS,
    Case,
    assert_near,
    interpreted_kernels,
    loss,
    problem,
)

CALLS = {"gpu": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}

CASES = {
    "causal, a plan for each head": Case(options=(("causal", True),)),
    "whole blocks": Case(96, 96, 2, 2, options=(("window", 40), ("scale", 0.3))),
    "blocks of several tiles": Case(140, 200, block_q=64, block_k=96),
    "cap and key bias, one plan": Case(
        heads=4, kv_heads=2, one_plan=True, bias=(1, 1, 1, None), options=(("soft_cap", 2.0),)
    ),
    "segments, and a bias of each head": Case(
        segments=True, bias=(None, None, 1, None), options=(("causal", True), ("window", 30))
    ),
    "tasks, and one bias for a head": Case(
        tasks=3, bias=(1, None, 1, 1), options=(("causal", True), ("offset", 25))
    ),
    "blocks larger than all": Case(9, 7, heads=1, batch=1),
    # On TPUs a step takes 512 keys: these lists have up to three steps, the last not whole.
    "many narrow blocks": Case(
        40, 1090, batch=1, block_k=16, options=(("causal", True), ("window", 700), ("offset", 900))
    ),
    "many narrow blocks, all seen": Case(40, 1090, batch=1, kv_heads=2, block_k=16),
}

both = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as back ends that run on a CPU, and take blocks that only hardware refuses."""
    monkeypatch.setattr(DISPATCH, "_TILED", interpreted_kernels())


@functools.cache
def value_and_grad(options, backend):
    function = functools.partial(loss, backend=backend, **dict(options))
    return jax.jit(jax.value_and_grad(function, has_aux=True))


@functools.cache
def wanted(name, seed, dtype="float32"):
    """What the reference returns, and its gradients."""
    floats, rest = problem(CASES[name], seed, jnp.dtype(dtype))
    (_, out), gradients = value_and_grad(CASES[name].options, "reference")(floats, rest)
    return out, gradients


def without_empty(lse):
    return np.where(lse == EMPTY, 0, lse)


@both
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_dense_masked_attention(interpreted, name, kernel):
    case = CASES[name]
    for seed in range(2):
        floats, rest = problem(case, seed)
        run = value_and_grad(case.options, kernel)
        (_, out), gradients = run(floats, rest)
        want, want_gradients = wanted(name, seed)
        np.testing.assert_array_equal(out.lse == EMPTY, want.lse == EMPTY)
        assert_near(out.y, want.y, 1e-5)
        assert_near(without_empty(out.lse), without_empty(want.lse), 1e-5)
        assert_near(gradients, want_gradients, 1e-4)
        assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, floats)


@pytest.mark.parametrize("options", [(("causal", True), ("offset", 900)), ()])
def test_on_tpus_keys_of_long_texts_are_copied_by_blocks(interpreted, monkeypatch, options):
    """Where they do not fit into vector memory; three steps of 512 keys, the last not whole."""
    monkeypatch.setattr(_forward_tpu, "RESIDENT_BYTES", 0)
    case = Case(50, 1100, heads=4, kv_heads=2, batch=1, block_k=16, options=options)
    floats, rest = problem(case, 0)
    got, want = (
        attention.attend(**floats, **rest, backend=backend, **dict(options))
        for backend in ("tpu", "reference")
    )
    assert_near(got.y, want.y, 1e-5)
    assert_near(without_empty(got.lse), without_empty(want.lse), 1e-5)


def test_the_cases_have_queries_that_see_nothing():
    assert sum(np.sum(wanted(name, seed)[0].lse == EMPTY) for name in CASES for seed in range(2))


@both
def test_low_precision_is_that_of_its_inputs_and_weights(interpreted, kernel):
    name, dtype = "causal, a plan for each head", "bfloat16"
    floats, rest = problem(CASES[name], 0, jnp.bfloat16)
    (_, out), gradients = value_and_grad(CASES[name].options, kernel)(floats, rest)
    want, want_gradients = wanted(name, 0, dtype)
    assert {x.dtype for x in (out.y, *gradients.values())} == {np.dtype(dtype)}
    assert out.lse.dtype == jnp.float32
    assert_near(without_empty(out.lse), without_empty(want.lse), 1e-5)
    assert_near(out.y, want.y, 1e-2)
    assert_near(gradients, want_gradients, 2e-2)


@both
def test_a_query_without_keys_gives_zero_and_no_gradient(interpreted, kernel):
    case = CASES["cap and key bias, one plan"]
    floats, _ = problem(case, 0)
    mask = jnp.zeros((1, 1, 6, 4), bool).at[:, :, 2:, 1].set(True)
    rest = {"plan": attention.from_mask(mask, attention.Tiling(90, 100, 16, 32, causal=False))}
    # Tiles that are left out are not read.
    listed = (jnp.arange(100) // 32 == 1)[None, :, None, None]
    floats |= {x: jnp.where(listed, floats[x], jnp.nan) for x in "kv"}
    run = value_and_grad(case.options, kernel)
    (_, out), gradients = run(floats, rest)
    np.testing.assert_array_equal(out.y[:, :32], 0)
    np.testing.assert_array_equal(out.lse[:, :32], np.float32(EMPTY))
    np.testing.assert_array_equal(gradients["q"][:, :32], 0)
    for x in "kv":
        np.testing.assert_array_equal(gradients[x][:, :32], 0)
    assert all(jnp.isfinite(x).all() for x in (out.y, *gradients.values()))
    assert (out.lse[:, 32:] > -1e3).all()
    # A bias of -infinity everywhere is nothing, and so is a plan without tiles.
    floats, _ = problem(case, 0)
    nothing = {"bias": jnp.full_like(floats["bias"], -jnp.inf)}
    no_plan = {
        "plan": attention.from_mask(
            jnp.zeros_like(mask), attention.Tiling(90, 100, 16, 32, causal=False)
        )
    }
    for got in (run(floats | nothing, rest), run(floats, no_plan)):
        np.testing.assert_array_equal(got[0][1].y, 0)
        np.testing.assert_array_equal(got[0][1].lse, np.float32(EMPTY))
        assert all((x == 0).all() for x in got[1].values())


@both
def test_new_plans_compile_nothing_anew(interpreted, kernel):
    case = CASES["cap and key bias, one plan"]
    run = value_and_grad(case.options, kernel)
    run(*problem(case, 0))
    before = run._cache_size()
    run(*problem(case, 3))
    assert run._cache_size() == before


@both
def test_under_vmap(interpreted, kernel):
    case = Case(32, 32, batch=1, block_q=16, block_k=16)
    problems = [problem(case, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *problems)

    def gradients(backend):
        return jax.grad(lambda *args: loss(*args, backend=backend, causal=True)[0])

    got = jax.jit(jax.vmap(gradients(kernel)))(*stacked)
    want = [jax.jit(gradients("reference"))(*one) for one in problems]
    assert_near(got, jax.tree.map(lambda *xs: jnp.stack(xs), *want), 1e-4)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lowered(kernel, case, dtype=jnp.float32, backend=None):
    """The module of the value and gradient of a problem, for a kernel's platform."""
    floats, rest = problem(case, 0, dtype)
    function = functools.partial(loss, backend=backend, **dict(case.options))
    return export.export(
        jax.jit(jax.value_and_grad(function, has_aux=True)),
        platforms=[PLATFORMS[kernel]],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(CALLS[kernel])],
    )(shapes(floats), shapes(rest)).mlir_module()


BIG = functools.partial(Case, 300, 400, 4, 2, block_q=128, block_k=128, batch=1)
LOWERED = {
    "causal": BIG(head_dim=128, options=(("causal", True),)),
    "all": BIG(
        head_dim=64,
        bias=(1, None, 1, None),
        segments=True,
        one_plan=True,
        options=(("causal", True), ("window", 30), ("soft_cap", 2.0), ("offset", 7)),
    ),
    "tasks of odd heads": BIG(head_dim=40, tasks=3),
}


@both
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_lowers_for_its_platform_and_is_chosen_there(kernel, name, dtype):
    text = lowered(kernel, LOWERED[name], dtype)
    if kernel == "tpu" and dtype == jnp.float16:
        assert CALLS[kernel] not in text
        return
    assert text.count(CALLS[kernel]) == 3  # forward, and two backward
    assert "while" not in re.sub(r"backend_config = .*", "", text)  # no loop of XLA's


@both
def test_what_a_kernel_cannot_run_goes_to_xla(kernel):
    text = lowered(kernel, BIG(head_dim=64, relative_heads=4))
    assert CALLS[kernel] not in text
    assert "while" in text


def test_a_fallback_is_said_by_its_reason(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 96, 1, 64), jnp.float32)

    def run(size, platform):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        plan = attention.dense(attention.Tiling(96, 96, size, size))
        jax.eval_shape(lambda q: attention.attend(q, q, q, plan, causal=True), x)

    message = r"attend runs as loops of XLA's on this TPU.*24 queries and 24 keys.* multiples of 16"
    with pytest.warns(RuntimeWarning, match=message):
        run(24, "tpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(16, "tpu")
        run(24, "cpu")


def test_gpus_that_do_not_multiply_bfloat16_have_no_kernel(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 96, 1, 64), jnp.float32)
    plan = attention.dense(attention.Tiling(96, 96, 32, 32))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, message in (("7.5", "capability is 7.5: it must be at least 8"), ("9.0", None)):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            jax.eval_shape(lambda q: attention.attend(q, q, q, plan, causal=True), x)
        assert [
            str(w.message) for w in said if message and message in str(w.message)
        ] or not message
        assert bool(said) == bool(message)


def test_inside_of_shard_map():
    floats, rest = problem(BIG(head_dim=64, one_plan=True, bias=(1, 1, 1, None)), 0)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = {name: jax.P(None, None, "d") for name in "qkv"} | {"bias": jax.P()}

    def total(floats, rest):
        return jax.lax.psum(jnp.sum(attention.attend(**floats, **rest).y), "d")

    split = jax.shard_map(total, mesh=mesh, in_specs=(specs, jax.P()), out_specs=jax.P())
    text = str(jax.make_jaxpr(jax.grad(split))(floats, rest))
    assert text.count("pallas_call[") == 2 * 3  # of both kernels, forward and twice backward


PLAN = attention.dense(attention.Tiling(300, 400, causal=False))
REASONS = [
    (
        "gpu",
        {"plan": attention.dense(attention.Tiling(300, 400, 24, 128))},
        ("24 queries and 128 keys", "16"),
    ),
    (
        "tpu",
        {"plan": attention.dense(attention.Tiling(300, 400, 128, 40))},
        ("128 queries and 40 keys", "multiples of 16"),
    ),
    (
        "tpu",
        {
            "plan": attention.dense(attention.Tiling(300, 400, 128, 64)),
            "bias": jnp.ones((1, 1, 1, 400)),
        },
        ("128 queries and 64 keys", "with biases or segment ids", "multiples of 128"),
    ),
    ("gpu", {"task_shares": jnp.ones((5, 400)) / 5}, ("(64, 320)", "at most 256")),
    ("tpu", {"task_shares": jnp.ones((90, 400)) / 90}, ("bytes", "at most 12582912")),
    ("tpu", {x: jnp.ones((1, 300, 4, 64), jnp.float16) for x in "q"}, ("float16", "bfloat16")),
    (
        "gpu",
        {
            "plan": attention.from_mask(
                jnp.zeros((1, 1, 3, 4), bool), attention.Tiling(300, 400), capacity=0
            )
        },
        (),
    ),
]
REASONS += [
    (name, change, parts)
    for name in KERNELS
    for change, parts in (
        ({"relative_bias": jnp.ones((1, 699))}, ("relative_bias", "None")),
        ({"bias": jnp.ones((1, 1, 300, 1))}, ("(1, 1, 300, 1)", "[B|1, H|1, 1, S|1]")),
    )
]


@pytest.mark.parametrize(("kernel", "change", "parts"), REASONS)
def test_what_a_forced_kernel_cannot_run_is_named(kernel, change, parts):
    dtype = change["q"].dtype if "q" in change else jnp.float32
    arrays = {"q": jnp.ones((1, 300, 4, 64))} | {x: jnp.ones((1, 400, 2, 64), dtype) for x in "kv"}
    with pytest.raises(ValueError, match=f"backend is '{kernel}', which cannot") as error:
        attention.attend(**(arrays | {"plan": PLAN} | change), backend=kernel)
    for part in parts:
        assert part in str(error.value), error.value


def test_narrow_blocks_have_no_gradient_on_a_tpu():
    """Forced, it is refused by name; chosen for the forward pass alone, loops of XLA's go back."""
    case = BIG(head_dim=64)
    case = dataclasses.replace(case, block_q=64, block_k=16, options=(("causal", True),))
    floats, rest = problem(case, 0)
    with pytest.raises(ValueError, match=r"64 queries and 16 keys: .* for gradients, multiples of"):
        jax.eval_shape(jax.grad(lambda x: loss(x, rest, backend="tpu", causal=True)[0]), floats)
    text = lowered("tpu", case)
    assert text.count(CALLS["tpu"]) == 1
    assert "while" in re.sub(r"backend_config = .*", "", text)


def test_lists_of_the_gradient_must_fit_in_the_scalar_memory_of_a_tpu():
    def reason(heads, blocks, capacity):
        plan = attention.TilePlan(
            jax.ShapeDtypeStruct((1, heads, blocks, capacity), jnp.int32),
            jax.ShapeDtypeStruct((1, heads, blocks), jnp.int32),
            *(blocks * 128,) * 2,
            *(128, 128),
        )
        x = jax.ShapeDtypeStruct((1, blocks * 128, heads, 64), jnp.bfloat16)
        where = DISPATCH.Visibility(plan, None, None, None)
        rules = DISPATCH.Rules(1.0, None, True, None)
        operands = DISPATCH.Operands(x, x, x, None, None)
        assert tiles_gpu.unsupported(operands, where, rules) is None
        assert (
            tiles_tpu.unsupported(operands, where, rules) is None
        )  # forward they are read row by row
        return tiles_tpu.unsupported(operands, where, rules, "backward")

    assert reason(2, 256, 256) is None
    assert "at most 983040" in reason(4, 256, 256)
    assert "at most 983040" in reason(4, 256, 16)  # of the transposed plan


def test_kernels_cannot_run_on_a_cpu():
    x = jnp.ones((1, 128, 1, 64))
    for kernel in KERNELS:
        with pytest.raises(ValueError, match="interpret mode"):
            attention.attend(x, x, x, attention.dense(attention.Tiling(128, 128)), backend=kernel)
