"""Compiled kernels: schedules and disassembled code are counted part by part; the cases are there."""

import importlib.util

import jax
import pytest

from experiments.compiled import cases, gpu, page, tpu

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
    report = {
        "versions": {"jax": "1"},
        "cases": {"tiles, a": {"v5e": found}, "b": {"v6e": {"reason": "no | way"}}},
    }
    text = page.text_of(report)
    assert "| tiles, a | attend | v5e | 20 | 22 | 7 | 2.00 |" in text
    assert "| b | v6e | no / way |" in text


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
    text = page.text_of({"versions": {}, "cases": given})
    assert "| v5e | D=64 | forward | 100 | 64 x 16: 1.50 |" in text
    assert "| v5e | D=64 | backward | 80 | 128 x 128: 1.50 |" in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="make compiled installs it")
def test_a_kernel_compiles_for_a_gpu():
    program = cases.pages("gpu", 64, 4)
    (kernel,) = gpu.kernels(program)
    found = gpu.report(kernel, "sm_90")
    assert found["spilled bytes"] == 0
    assert found["matrix in the loop"] > 0
