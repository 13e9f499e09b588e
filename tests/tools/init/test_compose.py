"""What the spec says of models and machines that are not here."""

import pytest

from slipstream import spec as specs
from slipstream.tools.init.compose import Plan, data_text, spec_text
from slipstream.tools.init.facts import Facts
from slipstream.tools.init.machine import Machine
from slipstream.tools.init.source import name_of

SMALL = Machine("a machine", 2, frozenset({"avx2"}), ())
LARGE = Machine("a machine", 64, frozenset({"avx512_bf16"}), ("NVIDIA H100",))


def facts(framework: str = "onnx", shape: tuple[int, ...] = (3, 8, 8), dtype: str = "float32", **more: object) -> Facts:
    given = {"output_shape": (5,), "parameters": 10, "layers": {"Conv": 2}} | more
    return Facts.model_validate({"framework": framework, "input_shape": shape, "input_dtype": dtype, **given})


def plan(given: Facts, machine: Machine = SMALL) -> Plan:
    architecture = "mine:net" if given.framework == "torch" else None
    return Plan(
        "net", "net.onnx", "models:/net@source", given, machine, "net_data:data", False, 1000, None, architecture
    )


CASES = {
    "images": facts(),
    "tokens": facts(shape=(-1,), dtype="int64", layers={"MatMul": 48, "Softmax": 6}),
    "boxes": facts(output_shape=(100, 6)),
    "pixels": facts(output_shape=(4, 8, 8)),
    "quantized": facts(layers={"QuantizeLinear": 3, "Conv": 2}),
    "keras": facts("keras"),
    "torch": facts("torch"),
    "unknown shapes": Facts(framework="torch", parameters=10, layers={"Linear": 2}),
}


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_every_spec_validates_and_names_what_to_check(given: Facts, machine: Machine) -> None:
    made = plan(given, machine)
    text = spec_text(made)
    spec = specs.parse(text, "made")
    assert spec.rollout.approval, "a person looks at the first one"
    assert max(t.threads for t in spec.targets.values()) == min(machine.cores, 4)
    assert all(f"#   {line}" in text for line in made.unknown)
    compile(data_text(made, "net"), "data.py", "exec")


def test_what_the_model_and_the_machine_decide() -> None:
    def parsed(name: str, machine: Machine = SMALL) -> specs.Spec:
        return specs.parse(spec_text(plan(CASES[name], machine)), "made")

    assert parsed("tokens").targets["server"].lengths == (16, 32, 64, 128)
    assert parsed("images").targets["server"].lengths == ()
    assert [parsed(name).objective.metric for name in ("images", "boxes", "pixels")] == ["top1", "map", "miou"]
    assert list(parsed("quantized").recipes.values()) == [("simplify",)]
    assert parsed("images", LARGE).targets["bf16"].precision == "bf16"
    assert "bf16" not in parsed("images").targets
    assert CASES["tokens"].transformer and not CASES["images"].transformer
    assert "# gpu: {engine: tensorrt" in spec_text(plan(CASES["images"], LARGE))


@pytest.mark.parametrize(
    ("text", "name"), [("My Net_v2", "my-net-v2"), ("--", "model"), ("é", "model"), ("a" * 50, "a" * 40)]
)
def test_names_are_those_that_a_spec_takes(text: str, name: str) -> None:
    assert name_of(text) == name
