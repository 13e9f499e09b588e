"""The terminal's table fits, and the request line gets a label from a real answer."""

import io
import json
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from rich.console import Console
from tests.reports import made_up, sample

from slipstream.contract.evidence import Noise
from slipstream.reports import tables
from slipstream.reports.document import Report


def printed(report: Report, width: int = tables.WIDTH) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(tables.summary(report))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_table_fits_80_columns_and_cuts_nothing() -> None:
    lines = printed(made_up.report(*sample.whole_run()))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    for figure in ("pruned-int8", "← picked", "92.55", "+0.19 to +0.71", "7.65×", "7.41 to 7.88", "98 kB", "11,765"):
        assert figure in text
    assert "✕ int8@portable  speed: 0.94×" in text


def test_missing_cells_and_noise_are_said() -> None:
    noisy = Noise(clean_rounds=3, rounds=10, others_cores=1.2)
    evidence = sample.evidence("int8@server", 1).model_copy(update={"noise": noisy})
    output = sample.validate_outputs()[1]
    changed = output.model_copy(update={"details": {"evidence": evidence.model_dump(mode="json")}})
    text = "\n".join(printed(made_up.report(changed)))
    assert "! " in text and "server missing" in text and "a step failed" in text
    assert "Other processes were busy" in text


class Answers(BaseHTTPRequestHandler):
    """A V2 answer whose second class has the highest score, if the request is a V2 request."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        scores = [0.1, 2.5] if asked["inputs"][0]["name"] == "input" else []
        body = json.dumps({"outputs": [{"name": "output", "shape": [1, 2], "datatype": "FP32", "data": scores}]})
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_the_request_line_prints_the_label(tmp_path: Path) -> None:
    folder = tmp_path / "run with a space + plus"
    folder.mkdir()
    request, classes = folder / "request.json", folder / "classes.json"
    request.write_text('{"inputs":[{"name":"input","shape":[1],"datatype":"FP32","data":[0]}]}')
    classes.write_text('["Bag", "Ankle boot"]')
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v2/models/m/infer"
    try:
        for given, label in ((classes, "Ankle boot"), (None, "1")):
            line = tables.curl(url, request, given).replace("| python3", f"| {shlex.quote(sys.executable)}")
            done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, timeout=30)
            assert done.stdout.strip() == label
    finally:
        server.shutdown()
        server.server_close()
