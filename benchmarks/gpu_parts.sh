# Sourced by gpu_check.sh and gpu_speed.sh: parts with time limits of their own, a log and a summary.
#
#     begin NAME SECONDS_IN_ALL FOLDER    goes to the checkout, sets PYTHONPATH, makes the folder
#     part NAME SECONDS COMMAND...        runs a command; what is left of all the seconds bounds it too
#     needs PACKAGE NAME                  whether a package is installed; if not, part NAME counts as skipped
#     summarize                           prints and writes the summary; fails if a part did
#
# Environment: PYTHON (default python3), WHEELS (a folder of wheels, or of what they unpack to), PARTS (the names of the
# parts to run, default all of them), LIMIT (seconds in all).

begin() {
    script=$1
    deadline=$((SECONDS + ${LIMIT:-$2}))
    if [ -z "${3:-}" ]; then
        echo "usage: bash benchmarks/$script.sh FOLDER" >&2
        exit 2
    fi
    mkdir -p "$3" && folder=$(cd "$3" && pwd) || exit 2
    python=${PYTHON:-python3}
    [ -z "${WHEELS:-}" ] || WHEELS=$(cd "$WHEELS" && pwd) || exit 2
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    if compgen -G "${WHEELS:-}/*.whl" >/dev/null; then
        unpacked=$(mktemp -d)
        trap 'rm -rf "$unpacked"' EXIT
        for wheel in "$WHEELS"/*.whl; do "$python" -m zipfile -e "$wheel" "$unpacked" || exit 2; done
        WHEELS=$unpacked
    fi
    export PYTHONPATH=$PWD${WHEELS:+:$WHEELS}${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    log=$folder/$script.log
    summary=$folder/$script.txt
    : >"$log"
    : >"$summary"
    failed=0
}

part() {
    local name=$1 seconds=$2 left=$((deadline - SECONDS)) started=$SECONDS status outcome
    shift 2
    wanted "$name" || return 0
    [ "$seconds" -le "$left" ] || seconds=$left
    echo "== $name (at most $seconds s): $*" | tee -a "$log"
    if [ "$seconds" -lt 4 ]; then
        note "$name" 0 "not started: no time left"
        failed=1
        return 0
    fi
    # into the log, not through a pipe: a pipe would stay open as long as any process that the part has started
    timeout -k 2 $((seconds - 2)) "$@" >"$log.part" 2>&1
    status=$?
    cat "$log.part" >>"$log"
    tail -n 30 "$log.part"
    rm -f "$log.part"
    case $status in
        0) outcome="done" ;;
        124 | 137) outcome="timed out" failed=1 ;;
        *) outcome="failed (exit code $status)" failed=1 ;;
    esac
    note "$name" $((SECONDS - started)) "$outcome"
}

wanted() { case " ${PARTS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac; }

note() { printf '%-10s %4d s  %s\n' "$@" >>"$summary"; }

needs() {
    local package=$1 name=$2
    wanted "$name" || return 1
    "$python" -c "import $package" 2>/dev/null && return 0
    note "$name" 0 "skipped: $package is not installed"
    return 1
}

summarize() {
    echo "== summary of $script, records in $folder"
    cat "$summary"
    return "$failed"
}
