"""torchrun on two hosts: network namespaces with addresses of their own, which meet through c10d."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hdc.data.synthetic import make_dataset

SCRIPT = Path(__file__).with_name("two_hosts.sh")
TRAIN = [
    "--backbone=tiny",
    "--clips.size=32",
    "--augment.crop_size=28",
    "--batch_size=8",
    "--epochs=1",
    "--device=cpu",
    "--optimizer.lr=1e-6",
    "--log_every=1",
]


def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    """Two hosts with one rank each log what a single process logs, and one of them writes."""
    if not shutil.which("ip"):
        pytest.skip("there is no ip command")
    probe = subprocess.run([SCRIPT, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no network namespaces: {probe.stderr.strip()}")
    make_dataset(tmp_path / "videos", train=10, test=5, seed=0)
    options = ["pretrain", f"--data={tmp_path}/videos", *TRAIN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    hdc_train = ["-m", "hdc.cli", *options]
    subprocess.run(
        [sys.executable, *hdc_train, f"--out={tmp_path}/one"],
        env=environment,
        check=True,
        timeout=120,
    )

    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1"
    # torchrun tells by the machine's name whether it is the endpoint, and both hosts have the same.
    meet = '--rdzv-backend=c10d --rdzv-id=test --rdzv-endpoint="$MASTER:29400"'
    meet += ' --rdzv-conf="is_host=$((1 - HOST))" --local-addr="10.213.0.$((HOST + 1))"'
    # Each host has a folder of its own: the one of rank 0 gets the files.
    run = f'{torchrun} {meet} {" ".join(hdc_train)} --out="{tmp_path}/host$HOST"'
    done = subprocess.run(
        [SCRIPT, "sh", "-c", run], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    written = [tmp_path / f"host{host}" for host in (0, 1) if (tmp_path / f"host{host}").exists()]
    assert len(written) == 1
    ours, theirs = (
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (written[0], tmp_path / "one")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
