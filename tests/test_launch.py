"""The launchers: shell that shellcheck accepts, a manifest with what JobSet needs, commands that eim_jax.main takes."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_accepts_the_script(script):
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([checker, "--severity=style", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_hadolint_accepts_the_image():
    checker = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([checker, LAUNCH / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_image_copies_what_is_there_and_ends_by_the_signal_that_saves():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(copied) == kept and all((ROOT / name).exists() for name in copied)
    assert "STOPSIGNAL SIGTERM" in lines and 'ENTRYPOINT ["eim_jax"]' in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r'"\.\[([\w,]+)\$', "\n".join(lines))[1].split(",")
    assert {*extras, "cuda", "tpu"} <= set(project["optional-dependencies"])


def test_the_sky_file_gives_commands_that_main_takes():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    (mounted,) = task["file_mounts"]
    assert all(f'--workdir="{mounted}/$NAME"' in line for line in task["run"].splitlines() if "eim_jax" in line)
    for part in (task["setup"], task["run"]):
        checker = Path(sys.executable).with_name("shellcheck")
        options = ["--shell=bash", "--severity=warning", "--exclude=SC2154", "-"]
        found = subprocess.run([checker, *options], input=part, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


def run_with_stubs(tmp_path, script, arguments, stubs, **environment):
    """Runs a script where the cluster's commands are stubs that write their arguments to calls.txt."""
    for name, code in stubs.items():
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> "{tmp_path}/calls.txt"\n{code}\n')
        stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", LAUNCH / script, *arguments]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True, check=False
    )
    return done.returncode, (tmp_path / "calls.txt").read_text().splitlines()


ARGUMENTS = ["--config=configs/miniature.py", "--workdir=/shared/a b"]


def test_slurm_runs_the_command_once_where_it_succeeds(tmp_path):
    code, calls = run_with_stubs(tmp_path, "slurm.sh", ARGUMENTS, {"srun": "", "scontrol": ""}, SLURM_JOB_ID="7")
    assert code == 0
    assert calls == [f"srun --kill-on-bad-exit=1 .venv/bin/python -m eim_jax.main {' '.join(ARGUMENTS)}"]


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("4", True), ("5", False)])
def test_slurm_requeues_a_run_that_ended_badly_five_times_at_most(tmp_path, restarts, requeued):
    stubs = {"srun": "exit 1", "scontrol": ""}
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    code, calls = run_with_stubs(tmp_path, "slurm.sh", ARGUMENTS, stubs, **environment)
    assert code == 1
    assert calls[1:] == (["scontrol requeue 7"] if requeued else [])


def test_slurm_asks_for_one_process_a_gpu():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # not B:, which would reach the shell alone


def test_a_lost_tpu_host_has_the_same_command_started_again_on_all_hosts(tmp_path):
    failing_once = (
        f'case "$*" in *kill*) ;; *) test -e {tmp_path}/again || {{ touch {tmp_path}/again; exit 1; }};; esac'
    )
    code, calls = run_with_stubs(tmp_path, "tpu_vm.sh", ["pod", "zone", *ARGUMENTS], {"gcloud": failing_once})
    assert code == 0
    runs = [call for call in calls if "eim_jax.main --config" in call]
    assert len(runs) == 2 and runs[0] == runs[1]
    assert "kill -9" in calls[1] and "pkill" not in calls[1]  # the process that it started, no others
    assert all("--worker=all" in call for call in calls)
    assert r"--workdir=/shared/a\ b" in runs[0]  # the space survives the remote shell


def test_the_jobset_is_whole():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    # The hosts of the slice: its chips, by those that a pod asks for.
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert int(sides[0]) * int(sides[1]) == chips * spec["parallelism"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    user = re.search(r"^USER (\d+)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert pod["securityContext"]["fsGroup"] == int(user)  # else the run could not write its work directory
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_jobsets_command_is_one_that_main_takes():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    config = re.search(r"--config=(\S+)", text)[1]
    assert (ROOT / config).exists()
    flags = re.findall(r"- --(\w+)=", text)
    known = subprocess.run(
        [sys.executable, "-m", "eim_jax.main", "--helpfull"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    assert all(f"--{flag}" in known or f"--[no]{flag}" in known for flag in flags)
