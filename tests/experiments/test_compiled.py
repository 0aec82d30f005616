"""Compiled kernels: schedules and disassembled code are counted part by part; the cases are there."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.compiled import cases, gpu, measure, page, pods, sizes, tpu
from experiments.harness import collectives

SCHEDULE = """
1:LB: loop body
 0x0   :  { %s1 = smov 0 }
 0x1 LB: > { %s2 = sphi %s1 }
 0x2   : > { %9 = sbr.rel (%p1) target = $region4 }
 0x3   :  {}
 0x4   : > { %v1 = vst 0 } /* End region 3 */
 0x5 PF: > { %p2 = scmp.ge 1 } /* Start/End empty region 4 */
 0x6   : > { %9 = sbr.rel (%p2) target = $region7 }
 0x7   : > { %v2 = vmatmul.bf16 %v1 }
 0x8   : > { %v3 = vmatmul.bf16 %v2 }
 0x9 PF: > { %p3 = scmp.ge 2 } /* Start/End empty region 7 */
 0xa   : > { %9 = sbr.rel (%p3) target = $region9 }
 0xb   : > { %v2 = vmatmul.bf16 %v1 }
 0xc   : > { %v4 = vadd.f32 %v2 }
 0xd   : > { %v5 = vadd.f32 %v4 }
 0xe PF: > { %s3 = sadd.s32 1 } /* Start/End empty region 9 */
 0xf   :  { %99 = vsyncpa 1 }
"""

CODE = """
        .text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.U8 R2, desc[UR4][R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   ISETP.GE.AND P0, PT, R2, 0x4, PT ;
        /*0050*/                   LOP3.LUT R2, R2, 0x7, RZ, 0xc0, !PT ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   EXIT ;
        /*0080*/                   NOP ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_a_schedule_by_its_parts():
    found = tpu.schedule_of(tpu.read(SCHEDULE))
    # The loop has 14 cycles, 2 of them a beginning without products under a predicate, and two branches
    # of 2 and 3.
    assert found == tpu.Schedule(step=7, branches=(2, 3), beside=4)
    assert found.cycles == 9


def test_a_part_around_the_work_of_a_step_is_no_branch():
    """As kernels of a grid alone are: a predicate around everything, and one around what ends a row."""
    around = SCHEDULE.replace("%s2 = sphi %s1 }", "%9 = sbr.rel (%p0) target = $region10 }")
    around = around.replace(
        "%s3 = sadd.s32 1 } /* Start/End empty region 9 */",
        "%s3 = smov 0 } /* Start/End empty region 9 :: Start/End empty region 10 */",
    )
    found = tpu.schedule_of(tpu.read(around))
    assert (found.branches, found.cycles) == ((2, 3), 9)


def test_disassembled_code():
    found = gpu.counts(CODE)
    assert found["instructions"] == 9
    assert (found["matrix"], found["compare"], found["logic"]) == (1, 1, 1)
    assert (found["load"], found["narrow load"]) == (1, 1)
    loop = gpu.counts(gpu.loop_of(CODE))
    assert loop["instructions"] == 5
    assert loop["narrow load"] == 1
    assert gpu.loop_of("        /*0000*/                   EXIT ;\n") == ""


def test_strings_of_mlir():
    assert gpu._unescaped(r"ML\EFR\0D\22a\\b\"") == b'ML\xefR\r"a\\b"'


def test_cases_of_the_library_trace():
    given = cases.all_cases()
    ours = [
        x for name, x in given.items() if name.startswith("tiles forward, 256") or "64 x 16" in name
    ]
    assert ours
    for case in ours:
        program = case.make()
        assert jax.eval_shape(program.run, *program.shapes).shape[1] == cases.TOKENS


def test_the_page_names_what_was_refused():
    step = {
        "cycles of a step": 80, "cycles of a step, longest branch": 90, "cycles beside": 7,
        "cycles for its work": 20.0,
    }  # fmt: skip
    found = {"kernels": {"attend": step}, "work of a step": 4.0, "temporary bytes": 2_000_000}
    pod = {
        "arguments bytes": 2**31, "temporary bytes": 2**29, "part of the memory": 0.125,
        "collectives": {"all-reduce": {"count": 65, "bytes": 12_300_000}},
    }  # fmt: skip
    report = {
        "versions": {"jax": "1"},
        "cases": {"tiles, a": {"v5e": found}, "b": {"v6e": {"reason": "no | way"}}},
        "pods": {"decode": {"v5e, 16 chips": pod}, "train": {"v5p": {"reason": "too large"}}},
    }
    text = page.text_of(report)
    assert "| tiles, a | attend | v5e | 20 | 22 | 7 | 2.00 |" in text
    assert "| b | v6e | no / way |" in text
    assert "| decode | v5e, 16 chips | 2.00 | 0.50 | 12.5 % | 65 all-reduce, 12.3 MB |" in text
    assert "| train | v5p | too large |" in text


def test_the_page_holds_kernels_against_the_best_of_the_others():
    def of(**cycles):
        step = {"cycles of a step": 0, "cycles of a step, longest branch": 0, "cycles beside": 0}
        kernels = {name: step | {"cycles for its work": x} for name, x in cycles.items()}
        return {"v5e": {"kernels": kernels, "work of a step": 1.0, "temporary bytes": 0}}

    given = {
        "tiles forward, 64 x 16, D=64, bf16": of(attend_forward=150.0),
        "splash forward, 512 x 512 by 512, D=64, bf16": of(splash_fwd=120.0),
        "splash forward, 1024 x 1024 by 512, D=64, bf16": of(splash_fwd=100.0),
        "tiles backward, 128 x 128, D=64, bf16": of(attend_forward=9.0, queries=60.0, keys=60.0),
        "splash backward, 512 x 512, D=64, bf16": of(fwd_residuals=9.0, dq=40.0, dkv=40.0),
    }
    text = page.text_of({"versions": {}, "cases": given, "pods": {}})
    assert "| v5e | D=64 | forward | 100 | 64 x 16: 1.50 |" in text
    assert "| v5e | D=64 | backward | 80 | 128 x 128: 1.50 |" in text


SMALL = {
    "LAYERS": 2, "WIDTH": 64, "INNER": 128, "VOCABULARY": 256, "HEADS": 16, "HEAD_DIM": 64,
    "REQUESTS": 2, "CONTEXT": 2048, "PROMPT": 256, "EXAMPLE": 512, "BLOCK": 32, "UNITS": 64,
    "LOSS_TOKENS": 16,
}  # fmt: skip


@pytest.fixture
def on_eight(monkeypatch):
    """What compiles a program of small sizes for the simulated devices."""
    for name, size in SMALL.items():
        monkeypatch.setattr(sizes, name, size)

    def compiled(name):
        program = pods.programs()[name](np.array(jax.devices()[:8]))
        return program, jax.jit(program.run).lower(*program.shapes).compile()

    return compiled


def zeros(shapes):
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)


def test_a_decoder_on_a_pod_sums_twice_a_layer_and_gathers_no_cache(on_eight):
    _, run = on_eight("decode, a token of each request")
    sent = collectives.by_kind(run.as_text(), passes=1)
    assert sent["all-reduce"].collectives == 1 + 2 * SMALL["LAYERS"]
    assert sent["all-gather"].bytes <= 8 * 2 * SMALL["REQUESTS"] * 4  # the best of each vocabulary
    assert set(sent) == {"all-reduce", "all-gather"}


def test_a_model_of_zeros_learns_on_a_pod_from_equal_logits(on_eight):
    program, run = on_eight("training step over half of the tiles")
    _, _, loss = run(*zeros(program.shapes))
    np.testing.assert_allclose(loss, math.log(SMALL["VOCABULARY"]), rtol=1e-6)


@pytest.mark.parametrize("name", [x for x in pods.programs() if x.startswith("sharded")])
def test_stages_on_a_pod_trace(on_eight, name):
    program = pods.programs()[name](np.array(jax.devices()[:8]))
    assert jax.tree.leaves(jax.eval_shape(program.run, *program.shapes))


def test_loops_of_a_program_count_their_passes():
    def summed(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "d") / 8, None), x, None, length=5)[0]

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    run = jax.shard_map(
        summed, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"), check_vma=False
    )
    text = jax.jit(run).lower(jnp.ones(24)).compile().as_text()
    assert collectives.by_kind(text, passes=1) == {"all-reduce": (15, 60, 5)}


@pytest.mark.slow
def test_an_accelerator_is_measured_on_a_cpu_too():
    rows = {(row.case, row.metric): row.value for row in measure.measure_all(quick=True)}
    assert rows["decoding", "tokens_per_s"] > 0
    assert {f"pages_{bits}bits" for bits in (16, 8, 4, 3)} < {case for case, _ in rows}
    assert all(np.isfinite(x) and x > 0 for x in rows.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="make compiled installs it")
def test_a_kernel_compiles_for_a_gpu():
    program = cases.pages("gpu", 64, 4)
    (kernel,) = gpu.kernels(program)
    found = gpu.report(kernel, "sm_90")
    assert found["spilled bytes"] == 0
    assert found["matrix in the loop"] > 0
