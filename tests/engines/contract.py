"""What every engine must do. A test module subclasses `EngineContract` and supplies the target; conftest.py has the
candidates."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.engines.candidates import network, write
from tests.engines.images import CLASSES, SHAPE, samples

from slipstream import digests, hardware
from slipstream.engines.base import MANIFEST, build_engine, engine_for, load_engine, read_manifest, record_answers
from slipstream.engines.peak import peak_memory_mib
from slipstream.engines.recorded import FILE
from slipstream.errors import DataError, EngineError
from slipstream.frameworks.base import ONNX
from slipstream.spec import Target
from slipstream.steps.build import reference


def edit_manifest(engine: Path, **changes: object) -> None:
    """Change fields of engine.json as with an editor."""
    document = json.loads((engine / MANIFEST).read_text())
    (engine / MANIFEST).write_text(json.dumps({**document, **changes}))


def change_facts(engine: Path, **facts: str) -> None:
    """Change the fingerprint in engine.json, as if the engine had been built elsewhere."""
    edit_manifest(engine, fingerprint=read_manifest(engine).fingerprint | facts)


class EngineContract:
    """Subclasses have a fixture `target`: a CPU target with precision f32."""

    @pytest.fixture
    def engine(self, fp32: Path, target: Target, tmp_path: Path) -> Path:
        """A freshly built engine folder."""
        build_engine(fp32, target, tmp_path / "engine")
        return tmp_path / "engine"

    @pytest.mark.parametrize("batch", [1, 3, 8])
    def test_fp32_equals_the_onnx_reference(self, engine: Path, fp32: Path, batch: int) -> None:
        x = samples(batch)
        y = load_engine(engine).run(x)
        assert y.shape == (batch, CLASSES)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, reference(fp32 / ONNX, x), rtol=1e-4, atol=1e-4)

    def test_its_peak_of_memory_is_that_of_a_process_of_its_own(self, engine: Path) -> None:
        peak = peak_memory_mib(engine, samples(3))
        assert peak is not None and 1 < peak < 2048

    def test_one_runner_takes_any_batch_size_in_any_order(self, engine: Path, fp32: Path) -> None:
        runner = load_engine(engine)
        x = samples(8)
        expected = reference(fp32 / ONNX, x)
        for sizes in ([8], [1, 3, 4], [3, 1, 1, 3]):
            got, start = [], 0
            for n in sizes:
                got.append(runner.run(x[start : start + n]))
                start += n
            np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-4, atol=1e-4)

    def test_answers_are_not_overwritten_by_later_calls(self, engine: Path) -> None:
        runner = load_engine(engine)
        for n in (1, 3):
            first = runner.run(samples(n))
            kept = first.copy()
            runner.run(-samples(n))
            np.testing.assert_array_equal(first, kept)

    def test_the_same_input_gives_the_same_bytes(self, engine: Path) -> None:
        x = samples(3)
        one, two = load_engine(engine), load_engine(engine)
        assert one.run(x).tobytes() == one.run(x).tobytes() == two.run(x).tobytes()

    def test_inputs_need_not_be_contiguous(self, engine: Path) -> None:
        runner = load_engine(engine)
        x = samples(6)
        np.testing.assert_array_equal(runner.run(x[::2]), runner.run(x[::2].copy()))

    def test_int8_is_close_to_fp32_but_not_equal(
        self, engine: Path, int8: Path, target: Target, tmp_path: Path
    ) -> None:
        manifest = build_engine(int8, target, tmp_path / "int8")
        x = samples(64)
        exact, rounded = load_engine(engine).run(x), load_engine(tmp_path / "int8").run(x)
        assert manifest.quantized
        assert 0 < np.abs(exact - rounded).max() < 0.25 * np.abs(exact).max()
        assert (exact.argmax(1) == rounded.argmax(1)).mean() > 0.9

    def test_manifest_names_everything_that_was_built(self, engine: Path, fp32: Path, target: Target) -> None:
        manifest = read_manifest(engine)
        assert manifest.target == target
        assert manifest.candidate_sha256 == digests.folder(fp32)
        assert (manifest.input_shape, manifest.output_shape) == (SHAPE, (CLASSES,))
        assert set(manifest.files) == {p.name for p in engine.iterdir()} - {MANIFEST}
        assert manifest.fingerprint == engine_for(target.engine).fingerprint(target)
        assert {"device", "cpu_features", "precision", target.engine} <= set(manifest.fingerprint)

    def test_an_engine_for_another_machine_is_refused_with_each_difference(self, engine: Path) -> None:
        change_facts(engine, precision="f8", device="NPU")
        with pytest.raises(EngineError, match=r"(?s)precision: built with 'f8'.*device|device.*precision: built with"):
            load_engine(engine)

    def test_an_older_version_is_refused_and_a_later_one_loads(self, engine: Path, target: Target) -> None:
        record_answers(engine, load_engine(engine), samples(5))
        version = read_manifest(engine).fingerprint[target.engine]
        change_facts(engine, **{target.engine: f"{version.partition('.')[0]}.0.0"})
        load_engine(engine)
        change_facts(engine, **{target.engine: f"{version.partition('.')[0]}.999"})
        with pytest.raises(EngineError, match=f"{target.engine}: built with '.*999', here.*slipstream rebuild"):
            load_engine(engine)

    def test_a_processor_with_other_features_loads_it_if_it_repeats_its_answers(self, engine: Path) -> None:
        change_facts(engine, cpu_features="")
        with pytest.raises(EngineError, match="no recorded answers"):
            load_engine(engine)
        change_facts(engine, cpu_features=hardware.describe()["cpu_features"])
        record_answers(engine, load_engine(engine), samples(5))
        change_facts(engine, cpu_features="")
        load_engine(engine)
        with np.load(engine / FILE) as stored:
            np.savez(engine / FILE, samples=stored["samples"], answers=stored["answers"] + 0.1)
        edit_manifest(engine, files=read_manifest(engine).files | {FILE: digests.file(engine / FILE)})
        with pytest.raises(EngineError, match=r"its own answers to 5 samples.*differs by up to 0\.1.*cpu_features"):
            load_engine(engine)

    def test_a_fact_that_this_version_does_not_know_is_a_difference(self, engine: Path) -> None:
        edit_manifest(engine, fingerprint={**read_manifest(engine).fingerprint, "driver": "1"})
        with pytest.raises(EngineError, match="driver"):
            load_engine(engine)

    def test_a_tampered_or_missing_file_is_refused(self, engine: Path) -> None:
        for name in read_manifest(engine).files:
            content = (engine / name).read_bytes()
            (engine / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(EngineError, match="not the file that was built"):
                load_engine(engine)
            (engine / name).unlink()
            with pytest.raises(EngineError, match="missing"):
                load_engine(engine)
            (engine / name).write_bytes(content)
        load_engine(engine)

    def test_a_folder_without_a_manifest_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="not an engine folder"):
            load_engine(tmp_path)

    def test_an_unknown_device_is_refused_before_anything_is_written(
        self, fp32: Path, target: Target, tmp_path: Path
    ) -> None:
        with pytest.raises(EngineError, match=r"'GPU\.7'.*CPU"):
            build_engine(fp32, target.model_copy(update={"device": "GPU.7"}), tmp_path / "none")
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize(
        "batch",
        [samples(1)[0], samples(1)[:, :, :8], samples(1).astype(np.float64), samples(1)[:0]],
        ids=["no batch dimension", "other shape", "other dtype", "empty"],
    )
    def test_a_wrong_batch_is_refused(self, engine: Path, batch: np.ndarray) -> None:
        with pytest.raises(DataError, match="N×1×16×16 float32"):
            load_engine(engine).run(batch)

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Path:
        """A candidate whose model cannot be read."""
        folder = write(tmp_path / "broken", network())
        (folder / ONNX).write_bytes(b"not a model")
        return folder

    def test_a_model_that_is_none_is_refused(self, broken: Path, target: Target, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="cannot"):
            build_engine(broken, target, tmp_path / "engine")
