"""Kill a run at random moments, resume it, and compare the artifact byte for byte with an uninterrupted one.

    python bench/kill.py --kills 30 --json OUT.json

Each round starts a run in a fresh work folder, sends SIGKILL after a random part of the time an uninterrupted run takes, starts the
same command again and lets it end. Everything the manifest lists is compared, and the manifest itself; the report holds seconds and
memory, which no two runs share.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import stamp

MEASURED = ("report.json", "report.html")


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir=options.folder))
    began = time.monotonic()
    _finish(options, folder / "whole")
    whole_seconds = time.monotonic() - began
    wanted = _digests(folder / "whole")
    rng = random.Random(options.seed)
    rounds = []
    for number in range(options.kills):
        out = folder / f"killed-{number}"
        moment = rng.uniform(0, whole_seconds)
        state = _kill(options, out, moment)
        _finish(options, out)
        same = _digests(out) == wanted
        rounds.append({"seconds": round(moment, 2), "killed": state["killed"], "blocks_kept": state["blocks"], "identical": same})
        what = "killed" if state["killed"] else "ended"
        print(f"{number + 1:>3}: {what} at {moment:6.2f} s, {state['blocks']} blocks kept, {'identical' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(out)
    identical = sum(each["identical"] for each in rounds)
    killed = sum(each["killed"] for each in rounds)
    print(f"{identical} of {options.kills} artifacts identical, {killed} runs killed")
    if options.json:
        result = {"kills": options.kills, "identical": identical, "killed": killed, "whole_seconds": whole_seconds, "rounds": rounds}
        options.json.write_text(json.dumps(result | stamp({}), indent=2) + "\n")
    shutil.rmtree(folder)
    return 0 if identical == options.kills else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bench/kill.yaml")
    parser.add_argument("--model", default="demo:dense")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work [default: the system's temporary folder]")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _command(options: argparse.Namespace, out: Path) -> list[str]:
    return [sys.executable, "-m", "compress", "run", options.recipe, options.model, "--out", str(out), "--json"]


def _finish(options: argparse.Namespace, out: Path) -> None:
    done = subprocess.run(_command(options, out), capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"a run failed with {done.returncode}:\n{done.stderr[-2000:]}{done.stdout[-2000:]}")


def _kill(options: argparse.Namespace, out: Path, moment: float) -> dict[str, int | bool]:
    """Kill a run `moment` seconds after its start; says whether it was still running and how many blocks lay on disk."""
    process = subprocess.Popen(_command(options, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        work = out.with_name(out.name + ".work")
        return {"killed": True, "blocks": len(list(work.rglob("block-*.safetensors")))}
    shutil.rmtree(out)  # it was faster than the first; run it whole again
    return {"killed": False, "blocks": 0}


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in MEASURED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
