"""`memdec push`: a finished export and its model card, in one commit, to a repository of the hub.

What is uploaded are the files that the export's manifest lists, each compared with its hash, the
gate and the card. Files of an earlier memory that the new one lacks go in the same commit: vLLM
would read them. Nothing else of the repository is touched.
"""

import contextlib
import fnmatch
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError, said_by
from vllm_memdec.gate import FILE as GATE
from vllm_memdec.gate import check_gate, read_gate
from vllm_memdec.train.data import hub
from vllm_memdec.train.data.artifacts import HASHED, json_sha256, write_atomic
from vllm_memdec.train.data.inputs import CONFIG
from vllm_memdec.train.data.ownership import (
    CARD,
    CARD_MARK,
    PARTIAL,
    PLAN,
    is_own_card,
    read_object,
)
from vllm_memdec.train.faults import (
    FULL,
    HANDLES,
    NOT_ALLOWED,
    OF_VALUES,
    chain,
    fault,
    reraise,
)
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.sharing.card import Naming, serve, write_card
from vllm_memdec.train.verify.report import STRAY, find_damage, read_manifest

BRANCH = re.compile(r"(?![0-9a-f]{40}$)[A-Za-z0-9][\w.+-]*")  # no commit: those cannot be added to
# What a memory is read from. Of tokenizers exact names: "tokenizer*" may be anybody's notes.
OF_MEMORY = (
    *(CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_config.json", "adapter_model.*", GATE, "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
WRITE = "make one that may at huggingface.co/settings/tokens and run `hf auth login`"


def push(
    export: Path, naming: Naming, private: bool, dry_run: bool, progress: Progress | None = None
) -> None:
    """Upload an export with its card; dry_run: write the card and list the files, no more.

    Raises MemdecError, in one sentence, for an export that is not whole, for names that the hub
    cannot have, and for what the hub refuses.
    """
    progress = progress or Progress()
    check_names(naming)
    files = checked_files(export, progress)
    base = place_card(export, naming, progress.say)
    files[CARD] = export / CARD
    sizes = {name: path.stat().st_size for name, path in files.items()}
    for name, size in sizes.items():
        progress.say(f"  {name}, {size:,} bytes")
    total = f"{len(files)} files, {sum(sizes.values()):,} bytes"
    if dry_run:
        progress.say(f"{total} for {naming.repo}; with --dry-run nothing is uploaded.")
        return
    progress.say(f"uploading {total} to {naming.repo}")
    with hub_session(naming.repo):
        commit = upload(files, naming, private, progress.say)
    progress.say(f"The memory is {naming.repo}@{commit}. Serve it beside its base:")
    progress.say(serve(replace(naming, revision=commit), base))


def check_names(naming: Naming) -> None:
    """Raise MemdecError for ids and branches that the hub cannot have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for option, given in (("REPO", naming.repo), ("--base-model", naming.base_model)):
        if given is None:
            continue
        try:
            validate_repo_id(given)
            whole = given.count("/") == 1
        except HFValidationError:
            whole = False
        if not whole:
            raise MemdecError(
                f"{option} must be a repository of the hub, ORG/NAME of letters, digits, '-', '_' "
                f"and '.', got {given!r}."
            )
    if naming.revision is not None and not BRANCH.fullmatch(naming.revision):
        raise MemdecError(
            f"--revision must be the name of a branch, such as v2, got {naming.revision!r}."
        )


def checked_files(export: Path, progress: Progress) -> dict[str, Path]:
    """Return the files that serving needs: name -> path; MemdecError for a damaged export."""
    manifest = read_manifest(export)
    if manifest is None or manifest["stage"] != "export":
        within = export / "export"
        where = f": give {within}" if within.is_dir() else ": give the export/ of a memdec build"
        if export.name.endswith(PARTIAL) or (export / PLAN).exists():
            where = ", its build has not finished: run memdec build again, it goes on where it was"
        raise MemdecError(f"{export} is no finished export{where}.")
    damage = list(find_damage(export, manifest, progress))
    strays = [each for each in damage if each.endswith(STRAY)]
    damage = [each for each in damage if each not in strays]
    if not damage and manifest["hash"] != json_sha256({key: manifest.get(key) for key in HASHED}):
        damage = ["its manifest.json is not what was written"]
    if damage:
        raise MemdecError(
            f"{export} is damaged and is not uploaded, {damage[0]}: copy it again, or delete it "
            "and run memdec build again."
        )
    for each in strays:
        progress.say(f"not uploaded: {each}")
    names = sorted(manifest["files"])
    if (gate := export / GATE).exists():
        width = (read_object(export / CONFIG) or {}).get("hidden_size")
        if warning := check_gate(gate, read_gate(gate, width)):
            progress.say(warning)
        names.append(GATE)
    return {name: export / name for name in names}


def place_card(export: Path, naming: Naming, say: Callable[[str], None]) -> str:
    """Write the export's model card, unless its user wrote one; return the id of the base.

    A card of the user's is checked: its head must name a base.
    """
    path = export / CARD
    if path.exists() and not is_own_card(path):
        if naming.base_model or naming.license or naming.languages:
            raise MemdecError(
                f"{path} is a card of your own, which no option changes: edit its head in place of "
                "--base-model, --license and --language, or delete it to have one written."
            )
        say(f"the card is {path}, which memdec did not write and leaves as it is")
        return base_of_card(path)
    card = write_card(export, naming)
    write_atomic(path, lambda part: part.write_text(card, encoding="utf-8"))
    say(f"the card is written: {path}")
    if naming.license is None:
        say("the card names no licence: give --license, such as apache-2.0, if others may use it")
    return base_of_card(path)


def base_of_card(path: Path) -> str:
    """Return the base that a card names; MemdecError if its head cannot be read or names none."""
    from huggingface_hub import ModelCard

    try:
        base = ModelCard(path.read_text(encoding="utf-8")).data.get("base_model")
    except Exception as error:  # of YAML, of UTF-8, or of the hub's library
        raise MemdecError(
            f"the head of {path} is no YAML that the hub reads ({said_by(error)}): mend it, or "
            "delete the file to have one written."
        ) from None
    first = base[0] if isinstance(base, list) and base else base
    if not isinstance(first, str):
        raise MemdecError(f"{path} names no base: add `base_model: ORG/NAME` to its head.")
    return first


def upload(
    files: dict[str, Path], naming: Naming, private: bool, say: Callable[[str], None]
) -> str:
    """Create the repository where there is none, and commit the files; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo, branch = HfApi(), naming.repo, naming.revision
    api.create_repo(repo, private=private or None, exist_ok=True)
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
    there = api.model_info(repo, revision=branch)
    if private and not there.private:
        raise MemdecError(
            f"{repo} is there and public, --private makes only new ones private: change that in "
            "its settings on the hub, or give another REPO."
        )
    names = [each.rfilename for each in there.siblings or []]
    check_replaceable(naming, names, files[CARD])
    say(f"{repo} is {'private' if there.private else 'public'}")
    gone = sorted(set(names_of_memory(names)) - files.keys())
    for name in gone:
        say(f"removed from {repo}: {name}, of an earlier memory")
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    message = "Memory with its card, by memdec push"
    return api.create_commit(
        repo, operations, commit_message=message, revision=branch, parent_commit=there.sha
    ).oid


def names_of_memory(names: Iterable[str]) -> Iterator[str]:
    """Yield those files of a repository that a memory is read from."""
    for name in names:
        if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in OF_MEMORY):
            yield name


def check_replaceable(naming: Naming, names: list[str], card: Path) -> None:
    """Raise MemdecError if the repository holds a model, or a card, that memdec did not write."""
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(naming.repo, name, revision=naming.revision, local_dir=folder))

    with tempfile.TemporaryDirectory(prefix="memdec-push-") as folder:
        held = (CONFIG in names and read_object(fetch(CONFIG))) or {}
        if any(names_of_memory(names)) and "memdec" not in held:
            raise MemdecError(
                f"{naming.repo} holds a model that is no memory of memdec, which is left as it is: "
                "give another REPO."
            )
        if CARD in names and is_own_card(card):
            text = fetch(CARD).read_text(encoding="utf-8", errors="replace")
            if CARD_MARK not in text and re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).strip():
                raise MemdecError(
                    f"the card of {naming.repo} was not written by memdec: copy it to {card}, "
                    "which is then uploaded as it is, or delete it on the hub."
                )


@contextlib.contextmanager
def hub_session(repo: str) -> Iterator[None]:
    """Let the hub be asked with the user's token; what fails is raised as one sentence."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    if hub.OFFLINE:
        raise MemdecError(
            "with HF_HUB_OFFLINE set the Hugging Face hub is not asked: unset it to push, or give "
            "--dry-run."
        )
    if get_token() is None:
        raise MemdecError(
            f"there is no token of the Hugging Face hub that may write to {repo}: run `hf auth "
            "login`, or set HF_TOKEN."
        )
    try:
        with hub.asking():
            yield
    except MemdecError:
        raise
    except Exception as error:  # of the hub's library, of its HTTP library, or of the storage
        refused = None if any(isinstance(e, HfHubHTTPError) for e in chain(error)) else fault(error)
        if refused is not None and refused.errno in (*FULL, *HANDLES, *NOT_ALLOWED):
            reraise(error)
        sentence = refusal(error, repo)
        if sentence is None:
            raise
        raise MemdecError(sentence) from error


def refusal(error: BaseException, repo: str) -> str | None:
    """Return what the hub refused, or that it could not be reached, in a sentence with the fix.

    None for an error that is neither: a defect.
    """
    from huggingface_hub.errors import HfHubHTTPError

    answers = [each for each in chain(error) if isinstance(each, HfHubHTTPError)]
    other = isinstance(error, OF_VALUES) and not isinstance(error, (OSError, JSONDecodeError))
    if not answers and other:
        return None
    if not answers:
        return (
            f"the Hugging Face hub cannot be reached for {repo} ({hub.reason(error)}): see to the "
            "network, or set HF_ENDPOINT to a mirror, and run again."
        )
    status = answers[-1].response.status_code
    if status == 401:
        return f"the Hugging Face hub does not accept the token for {repo}: {WRITE}."
    if status == 403:
        return (
            f"the token may not write to {repo}: {WRITE}, or give a REPO of yours or of an "
            "organization in which you may write."
        )
    if status == 404:
        return f"the Hugging Face hub has no {repo} that the token may see: check REPO, or {WRITE}."
    if status == 400:
        said = answers[0] if isinstance(error, HfHubHTTPError) else error
        return (
            f"the Hugging Face hub refuses what it was sent ({message_of(said)}): check --license, "
            "--language and --revision."
        )
    again = "run again later, what it has is not sent again"
    if status in (409, 412):
        again = "someone else changes it as well, run again"
    return f"the Hugging Face hub answered {status} for {repo}: {again}."


def message_of(error: BaseException) -> str:
    """Return what the hub said of a request, in one line."""
    message = getattr(error, "server_message", None) or str(error)
    return " ".join(re.sub(r"\.?\s*\n- ", ": ", message).split()).rstrip(".")
