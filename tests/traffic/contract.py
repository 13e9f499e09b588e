"""What every traffic controller does. A suite subclasses `TrafficContract` and has a fixture `control`."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from slipstream import digests
from slipstream.contract import Release
from slipstream.data.splits import Split
from slipstream.errors import ModelError, RegistryError
from slipstream.traffic import answers
from slipstream.traffic.base import Routes, TrafficController
from slipstream.traffic.load import Load, Record, Sent, send

A, B = Release(model="net", name="v1"), Release(model="net", name="v2")


def engine(folder: Path, **behaviour: object) -> Path:
    """An engine folder for the toy server; the fake looks at nothing in it."""
    folder.mkdir(parents=True)
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder


def split(n: int = 64) -> Split:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(n, 10)).astype(np.float32)
    return Split(inputs, inputs.argmax(axis=1).astype(np.int64))


def load(control: TrafficController, requests: int, model: str = "net", rate: float = 400, phase: str = "p") -> Sent:
    wanted = Load(control.endpoint(model), model, "run", phase, split(), requests, rate, 1, control.mirror(model))
    return send(wanted, lambda records: None, lambda done, total: None)


def shares(sent: Sent) -> dict[str | None, float]:
    counts = Counter(r.release for r in sent.records)
    return {name: 100 * n / len(sent.records) for name, n in counts.items()}


class TrafficContract:
    @pytest.fixture
    def two(self, control: TrafficController, tmp_path: Path) -> TrafficController:
        """v1 has all traffic, v2 is deployed."""
        for release in (A, B):
            control.deploy(release, engine(tmp_path / release.name / "engine"))
        control.set_routes("net", Routes(weights={"v1": 100}))
        return control

    def test_only_the_judged_bytes_are_deployed(self, control: TrafficController, tmp_path: Path) -> None:
        folder = engine(tmp_path / "judged" / "engine")
        judged = digests.folder(folder)
        (folder / "behaviour.json").write_text('{"changed": true}')
        with pytest.raises(
            ModelError, match=rf"net--v1: the engine in .* has sha256 .*, but {judged[:12]}… was judged"
        ):
            control.deploy(A, folder, judged)
        assert control.releases("net") == set()
        control.deploy(A, folder, digests.folder(folder))
        assert control.releases("net") == {"v1"}

    def test_nothing_is_routed_before_the_first_deployment(self, control: TrafficController) -> None:
        assert control.deployed("net") == control.releases("net") == set()
        assert control.routes("net") == Routes(weights={})
        try:
            control.endpoint("net")
        except RegistryError as error:
            assert "deploy a release first" in str(error)
        else:
            assert {r.status for r in load(control, 5).records} == {404}

    def test_a_release_answers_once_it_has_traffic(self, two: TrafficController) -> None:
        assert two.deployed("net") == two.releases("net") == {"v1", "v2"}
        sent = load(two, 40)
        assert shares(sent) == {"v1": 100}
        data = split()
        for record in sent.records:
            assert record.status == 200
            assert record.output is not None
            np.testing.assert_allclose(record.output[0], data.inputs[record.sample], rtol=1e-5)

    def test_weights_split_the_requests(self, two: TrafficController) -> None:
        two.set_routes("net", Routes(weights={"v1": 70, "v2": 30}))
        assert two.routes("net") == Routes(weights={"v1": 70, "v2": 30})
        assert shares(load(two, 400))["v2"] == pytest.approx(30, abs=10)

    def test_a_share_of_zero_is_no_share(self, two: TrafficController) -> None:
        two.set_routes("net", Routes(weights={"v1": 0, "v2": 100}))
        assert two.routes("net") == Routes(weights={"v2": 100})
        assert shares(load(two, 20)) == {"v2": 100}

    def test_the_mirror_gets_a_copy_and_answers_nobody(self, two: TrafficController) -> None:
        pairing, before = answers.pairing(two, A, B), two.observe(B).requests
        two.set_routes("net", Routes(weights={"v1": 100}, mirror="v2"))
        sent = load(two, 60)
        assert shares(sent) == {"v1": 100}
        pairs, unanswered = pairing.pairs(sent.records)
        assert (len(pairs), unanswered) == (60, 0)
        assert sorted(p.sample for p in pairs) == sorted(r.sample for r in sent.records)
        for pair in pairs:
            np.testing.assert_array_equal(pair.champion.output, pair.challenger.output)
        assert two.observe(B).requests - before == 60
        two.set_routes("net", Routes(weights={"v1": 100}))
        load(two, 20, phase="later")
        assert two.observe(B).requests - before == 60

    def test_observe_counts_requests_and_memory(self, two: TrafficController) -> None:
        before = two.observe(B)
        two.set_routes("net", Routes(weights={"v2": 100}))
        load(two, 30)
        after = two.observe(B)
        assert (after.requests - before.requests, after.errors - before.errors) == (30, 0)
        assert 1 < after.memory_mib < 4096

    def test_everything_can_be_repeated(self, two: TrafficController, tmp_path: Path) -> None:
        routes = Routes(weights={"v1": 95, "v2": 5}, mirror="v2")
        for _ in range(2):
            two.deploy(B, tmp_path / "v2" / "engine")
            two.set_routes("net", routes)
        assert two.routes("net") == routes
        two.set_routes("net", Routes(weights={"v1": 100}))
        for _ in range(2):
            two.retire(B)
        assert two.deployed("net") == {"v1"}

    def test_a_name_stands_for_one_engine(self, two: TrafficController, tmp_path: Path) -> None:
        with pytest.raises(RegistryError, match="net--v1 is deployed with"):
            two.deploy(A, engine(tmp_path / "other" / "engine", add=1))
        assert shares(load(two, 20)) == {"v1": 100}

    @pytest.mark.parametrize(
        "routes", [Routes(weights={"v1": 99, "v2": 1}), Routes(weights={"v1": 100}, mirror="v2")], ids=str
    )
    def test_a_release_with_traffic_is_not_retired(self, two: TrafficController, routes: Routes) -> None:
        two.set_routes("net", routes)
        with pytest.raises(RegistryError, match="net--v2 has traffic"):
            two.retire(B)
        assert "v2" in two.deployed("net")

    def test_no_traffic_to_what_is_not_deployed(self, two: TrafficController) -> None:
        before = two.routes("net")
        for routes in (Routes(weights={"v9": 100}), Routes(weights={"v1": 100}, mirror="v9")):
            with pytest.raises(RegistryError, match="v9 is not deployed"):
                two.set_routes("net", routes)
        assert two.routes("net") == before

    def test_models_do_not_touch_each_other(self, two: TrafficController, tmp_path: Path) -> None:
        other = Release(model="net-large", name="v1")
        two.deploy(other, engine(tmp_path / "large" / "engine"))
        two.set_routes("net-large", Routes(weights={"v1": 100}))
        before = two.observe(other).requests
        load(two, 20)
        assert two.observe(other).requests == before
        assert shares(load(two, 10, model="net-large")) == {"v1": 100}
        assert two.routes("net") == Routes(weights={"v1": 100})

    def test_no_request_is_dropped_while_the_weights_change(self, two: TrafficController) -> None:
        def change() -> None:
            for share in (5, 25, 50, 75, 100, 60, 30, 0):
                two.set_routes("net", Routes(weights={"v1": 100 - share, "v2": share}))
                time.sleep(0.2)  # some requests between one change and the next

        records, loads = list[Record](), 0
        with ThreadPoolExecutor(1) as pool:
            changing = pool.submit(change)
            while not changing.done():  # however long a busy machine takes for the changes
                records += load(two, 200, rate=300).records
                loads += 1
        changing.result()
        assert len(records) == 200 * loads
        assert [r for r in records if r.failed] == []
        assert {r.release for r in records} == {"v1", "v2"}
