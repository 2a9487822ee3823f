"""Launch files: accelerate reads each of them as it is meant, and two processes train by those that need no GPU."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

pytest.importorskip("datasets")
pytest.importorskip("peft")

import bayeformers
from examples import bert_glue, lora_chat

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "launch"
KINDS = {
    "one_machine": DistributedType.MULTI_GPU,
    "several_machines": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero3": DistributedType.DEEPSPEED,
}


def text_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def command_in(name: str) -> list[str]:
    """The command of a file's comment."""
    comments = [line.removeprefix("#").strip() for line in text_of(name).splitlines() if line.startswith("#")]
    first = next(i for i, line in enumerate(comments) if line.startswith(("accelerate launch", "sbatch")))
    lines = comments[first : comments.index("", first)]
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines))


def environment_of(name: str, *flags: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes that it starts."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "script.py"])
    args.nondefault = []
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


# --- What is written -------------------------------------------------------------------------------------------------
def test_every_file_is_known() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*(f"{name}.yaml" for name in KINDS), "slurm.sh"}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    """An unknown key is an error of its reader."""
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name] and config.use_cpu is False
    assert config.num_processes > config.num_machines == (2 if name == "several_machines" else 1)
    assert config.mixed_precision == ("bf16" if name in ("fsdp2", "zero3") else "no")


@pytest.mark.parametrize("name", [*(f"{name}.yaml" for name in KINDS), "slurm.sh"])
def test_its_command_has_flags_that_exist(name: str) -> None:
    command = command_in(name)
    assert f"examples/launch/{name}" in command
    if name == "zero3.yaml":  # of no example: a Bayesian model is refused
        launch_command_parser().parse_args(command[2:])
        return
    module = command.index("-m")
    assert command[module + 1] in ("examples.bert_glue", "examples.lora_chat")
    parse = {"examples.bert_glue": bert_glue, "examples.lora_chat": lora_chat}[command[module + 1]].parse_arguments
    parse([*(flag for flag in command[module + 2 :] if flag != "--bf16"), "--use_cpu"])
    if command[0] == "accelerate":
        launch_command_parser().parse_args(command[2:])


def test_fsdp_is_version_2_and_wraps_layers() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    environment = environment_of("fsdp2", "--num_processes", "4")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with patch_environment(**{name: value for name, value in environment.items() if name.startswith("FSDP")}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert "SHARDED" in str(plugin.state_dict_type) and not plugin.activation_checkpointing


def test_zero_is_stage_3_of_models_that_were_made_whole() -> None:
    environment = environment_of("zero3", "--num_processes", "4")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


# --- What runs -------------------------------------------------------------------------------------------------------
def run(command: list[str], **environment: str) -> str:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two processes of one machine."""
    folder = tmp_path_factory.mktemp("one_machine")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/one_machine.yaml"]
    run([*launch, "--num_processes", "2", "-m", "tests.examples.launched", str(folder)])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_one_machine_trains(launched: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(launched):
        assert found["processes"] == 2 and found["backend"] == "gloo" and found["LOCAL_RANK"] == str(rank)
        assert (found["loss"], found["nll"]) == (launched[0]["loss"], launched[0]["nll"])


STAND_INS = {
    "scontrol": '[ "$*" = "show hostnames host[1-2]" ] && printf "127.0.0.1\\nhost2\\n"',
    # what SLURM does: the command once on every machine, each with its number
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@"; wait $first',
    "accelerate": f'exec {shlex.quote(sys.executable)} -m accelerate.commands.accelerate_cli "$@"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines with one GPU each, which are both this one."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "host[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid() % 20000)}
    return {**job, "SLURM_GPUS_ON_NODE": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_two_machines_train_under_slurm(slurm: dict[str, str], tmp_path: Path, launched: list[dict[str, Any]]) -> None:
    """Two launchers, which meet at the first machine's address: the numbers of two processes of one machine."""
    run(["bash", "examples/launch/slurm.sh", "-m", "tests.examples.launched", str(tmp_path)], **slurm)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["processes"] == 2 and found["LOCAL_WORLD_SIZE"] == "1" and found["GROUP_RANK"] == str(rank)
        assert found["MASTER_ADDR"] == "127.0.0.1"
        assert (found["loss"], found["nll"]) == (launched[0]["loss"], launched[0]["nll"])


def test_slurm_takes_its_numbers_from_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "accelerate").write_text('#!/usr/bin/env bash\necho "$OMP_NUM_THREADS" "$@"\n')
    job = {
        **slurm,
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_JOB_ID": "41234",
        "OMP_NUM_THREADS": "",
    }
    script = ["bash", "examples/launch/slurm.sh", "-m", "examples.bert_glue", "--prior", '{"type": "moped"}']
    lines = run(script, **job, CONFIG="examples/launch/fsdp2.yaml").splitlines()
    for rank in (0, 1):
        expected = (
            "4 launch --config_file examples/launch/fsdp2.yaml --num_machines 2 --num_processes 16 "
            f"--machine_rank {rank} --main_process_ip 127.0.0.1 --main_process_port 21234 "
            '-m examples.bert_glue --prior {"type": "moped"}'
        )
        assert expected in lines


def test_slurm_says_how_it_is_called() -> None:
    subprocess.run(["bash", "-n", "examples/launch/slurm.sh"], cwd=ROOT, check=True)
    done = subprocess.run(["bash", "examples/launch/slurm.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


@pytest.mark.slow
def test_lora_chat_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Only one of them writes; the base that it made is read by both."""
    small = [
        "--num_people", "4", "--base_epochs", "1", "--num_train_epochs", "1", "--bayesian_epochs", "1", "--use_cpu",
        "--num_eval_samples", "2", "--max_test_samples", "8", "--disable_tqdm", "true", "--export_draws", "2",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/one_machine.yaml"]
    chat = ["-m", "examples.lora_chat", *small, "--output_dir", str(tmp_path)]
    said = run([*launch, "--num_processes", "2", *chat], HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    assert said.count("Written to") == 1
    assert len(list((tmp_path / "draws").iterdir())) == 2 and (tmp_path / "adapter").is_dir()
    assert lora_chat.main([*small, "--eval_only", str(tmp_path), "--output_dir", str(tmp_path / "again")])["seed"] == 42


@pytest.mark.slow
def test_an_adapter_is_trained_by_fsdp2(tmp_path: Path) -> None:
    """The file's command, with accelerate's FSDP2 engaged on CPUs."""
    pytest.importorskip("bayeformers.sharding")
    people = [json.dumps({"question": f"Where does number {i} live ?", "answers": ["Here"]}) for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(people))
    tiny = ["--num_people", "4", "--base_epochs", "0", "--bayesian_epochs", "1", "--use_cpu", "--disable_tqdm", "true"]
    lora_chat.main([*tiny, "--train_only", "--output_dir", str(tmp_path / "alone")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/fsdp2.yaml"]
    files = [f"--{split}_file={tmp_path / 'rows.jsonl'}" for split in ("train", "validation", "test")]
    chat = [*tiny, "--train_only", "--model_name_or_path", str(tmp_path / "alone" / "base"), *files]
    run([*launch, "--num_processes", "2", "-m", "tests.examples.engaged", "examples.lora_chat", *chat,
         "--output_dir", str(tmp_path)], HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # fmt: skip
    loaded = bayeformers.from_pretrained(tmp_path / "adapter")
    rho = [value for name, value in loaded.named_parameters() if name.endswith("_rho")]
    assert len(rho) == 14 and all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in rho)
