#!/bin/sh
# The emulated device tests: parts are fetched once, then two processes share the processors.
# usage: test.sh [--may-skip] [pytest options]      (root, Debian or Ubuntu; Python by $PYTHON)
#
# Where no board can be emulated it says why and ends with 0; with --may-skip also where parts cannot be fetched.
set -eu
project=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$project/.venv/bin/python}
cd "$project"

skip() { echo "SKIPPED the emulated device tests: $1"; exit 0; }
may_skip=
if [ "${1:-}" = --may-skip ]; then may_skip=yes; shift; fi
[ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] || skip "they need root on Linux"
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || skip "their root comes by apt: Debian or Ubuntu"
[ -d /proc/sys/fs/binfmt_misc ] || skip "this kernel has no binfmt_misc"
[ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc 2>/dev/null ||
    skip "binfmt_misc cannot be mounted here"
unshare --net true 2>/dev/null || skip "there are no network namespaces here"

said=$(mktemp -d)
second=
trap '[ -z "$second" ] || kill "$second" 2>/dev/null || true; rm -r "$said"' EXIT
trap 'cat "$said"/other 2>/dev/null; exit 143' TERM INT # as of `timeout 12m sh devices/test.sh`
began=$(date +%s)
if ! PYTHON=$python sh devices/emulator/prepare.sh .cache/devices >"$said/prepare" 2>&1; then
    tail -n 20 "$said/prepare"
    [ -z "$may_skip" ] || skip "an emulator, a Debian root and aarch64 wheels could not be fetched"
    exit 1
fi
echo "device tests: parts are there after $(($(date +%s) - began)) s"

# Of about the same length, with a board's README in each. The first one has the machine's output to itself; the second
# one's comes after it.
tests=devices/tests
readmes=$tests/test_install.py
readme=$readmes::test_the_readme_is_followed_to_its_end
one="$readmes $tests/test_numbers.py $tests/test_lan.py $tests/test_footprint.py --deselect $readme[jetson]"
other="$readmes $tests/test_sdk.py --deselect $readme[raspberrypi]"
# shellcheck disable=SC2086 # several words
"$python" -m pytest $other -s --timeout 1800 -p no:cacheprovider "$@" >"$said/other" 2>&1 &
second=$!
status=0
"$python" -m pytest $one -s --timeout 1800 -p no:cacheprovider "$@" || status=$?
wait "$second" || status=$?
second=
cat "$said/other"
echo "device tests: ended with $status after $(($(date +%s) - began)) s"
exit "$status"
