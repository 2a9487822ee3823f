# Sourced by the other scripts, from the repository root: `environment EXTRA` makes or reuses .venv with that extra installed.

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

SUITABLE='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'

# A name on the PATH may be a version manager's stub that only prints an error, so each candidate is run.
find_python() {
    local candidate
    for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c "$SUITABLE" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with venv and pip found; install one, or name it: PYTHON=/path/to/python bash $0"
}

# torch comes first and alone: a build of that version that the environment already has (CPU, CUDA, ROCm) is then kept.
install() {
    local pip=(.venv/bin/python -m pip --disable-pip-version-check)
    say "installing torch"
    "${pip[@]}" install --quiet "$(grep '^torch==' requirements.txt)" || fail "torch could not be installed"
    say "installing bayeformers[$1] and its pinned requirements"
    "${pip[@]}" install --quiet --constraint requirements.txt --editable ".[$1]" || fail "bayeformers[$1] could not be installed"
}

environment() {
    local wanted python
    wanted="$(cat setup.cfg pyproject.toml requirements.txt | cksum) $PWD"
    if ! .venv/bin/python -c "$SUITABLE" >/dev/null 2>&1; then
        python="$(find_python)"
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || fail "the virtual environment could not be made"
    fi
    # the extra `test` holds all others
    if grep -qsxF "$wanted" ".venv/installed-$1" .venv/installed-test; then
        say "reusing .venv: its requirements have not changed"
    else
        install "$1"
        printf '%s\n' "$wanted" >".venv/installed-$1"
    fi
    # neither the tests nor the default example may reach for the network
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    PATH="$PWD/.venv/bin:$PATH"
}
