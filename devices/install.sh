#!/bin/sh
# Installs kinflow on a board from this checkout; the scripts in raspberrypi/ and jetson/ call it.
# usage: install.sh BOARD [--service] [--uninstall] [--family NAME] [--extras LIST] [--wheels FOLDER]
#
#   (nothing)     for this user, without root: ~/.local/share/kinflow, ~/.local/bin/kinflow
#   --service     for the machine, as root: /opt/kinflow, /etc/kinflow/device.toml, kinflow-device.service
#   --uninstall   removes what the same call without it made, settings included
#   --family      one of families/: imagenet_lite for photographs; else the one installed before, or fashion
#   --extras      instead of the board's own, e.g. tflite,cli
#   --wheels      install from this folder of wheels, without a network
#
# Calling it again updates: the packages anew, settings as you left them (their bundle follows --family).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$here")
board=${1:?usage: install.sh raspberrypi|jetson [--service] [--uninstall] [--family NAME] [--extras LIST] [--wheels FOLDER]}
shift
[ -f "$here/$board/device.toml" ] || { echo "error: there is no board $board, only raspberrypi and jetson" >&2; exit 2; }

# What pip installs, and whether Python sees the system's packages, differs by board.
extras= venv_options= wheels= service= uninstall= chosen=
. "$here/$board/board.sh"
while [ $# -gt 0 ]; do
    case $1 in
    --service) service=yes ;;
    --uninstall) uninstall=yes ;;
    --family) chosen=${2:?--family needs a name}; shift ;;
    --extras) extras=${2:?--extras needs a list}; shift ;;
    --wheels) wheels=$(cd "${2:?--wheels needs a folder}" && pwd); shift ;;
    *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
    shift
done

if [ -n "$service" ]; then
    [ "$(id -u)" = 0 ] || { echo "error: --service needs root: sudo sh $0 $board --service" >&2; exit 2; }
    prefix=/opt/kinflow bin=/usr/local/bin settings=/etc/kinflow state=/var/lib/kinflow
else
    prefix=$HOME/.local/share/kinflow bin=$HOME/.local/bin settings=$HOME/.config/kinflow state=$prefix
fi
units=/etc/systemd/system
unit=kinflow-device.service

systemd() { # where it runs; not in a container or while an image is built
    [ ! -d /run/systemd/system ] || systemctl "$@"
}
installed() { command -v "$1" >/dev/null; }

if [ -n "$uninstall" ]; then
    if [ -n "$service" ]; then
        if [ -e "$units/$unit" ]; then
            systemd stop "$unit"
            ! installed systemctl || systemctl disable --quiet "$unit"
        fi
        rm -rf "$units/$unit" "$units/$unit.d" "$state"
        systemd daemon-reload
        # Its name and group went with it.
        if id kinflow >/dev/null 2>&1; then userdel kinflow; fi
    fi
    if [ "$(readlink "$bin/kinflow" || true)" = "$prefix/venv/bin/kinflow" ]; then rm "$bin/kinflow"; fi
    rm -rf "$prefix" "$settings/device.toml"
    # Only if nothing else is in them; /usr/local/bin is the system's.
    for folder in "$settings" "$HOME/.local/bin"; do
        rmdir "$folder" 2>/dev/null || true
    done
    echo "kinflow is removed"
    exit 0
fi

installed python3 || { echo "error: no python3: apt install python3 python3-venv" >&2; exit 2; }
python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "error: Python 3.10 to 3.13 is needed, this is $(python3 -V)" >&2; exit 2; }
[ "$(python3 -c 'import struct; print(struct.calcsize("P"))')" = 8 ] ||
    { echo "error: a 64-bit system is needed: numpy and the runtimes have no 32-bit wheels" >&2; exit 2; }
python3 -c 'import venv, ensurepip' 2>/dev/null ||
    { echo "error: python3 lacks venv: sudo apt install python3-venv" >&2; exit 2; }

for before in "$prefix"/families/*; do [ ! -d "$before" ] || family=$(basename "$before"); done
family=${chosen:-$family}
case $family in */* | .*) there= ;; *) there=$project/families/$family/bundle ;; esac
if [ -z "$there" ] || [ ! -e "$there/family.json" ]; then
    echo "error: --family $family: there is no bundle of it here, only of:" >&2
    for each in "$project"/families/*/bundle; do echo "  $(basename "$(dirname "$each")")" >&2; done
    exit 2
fi

mkdir -p "$prefix" "$bin" "$settings"
# An environment whose Python has gone (an upgrade of the system) is made anew.
if ! "$prefix/venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$prefix/venv"
    # shellcheck disable=SC2086 # several words or none
    python3 -m venv $venv_options "$prefix/venv"
fi
if [ -n "$wheels" ]; then
    set -- --no-index --find-links "$wheels" "kinflow[$extras]"
else
    set -- "$project[$extras]"
fi
"$prefix/venv/bin/python" -m pip install --disable-pip-version-check --quiet --upgrade --prefer-binary "$@"
rm -rf "$prefix/families"
mkdir "$prefix/families"
cp -R "$there" "$prefix/families/$family"
if [ -e "$bin/kinflow" ] && [ "$(readlink "$bin/kinflow" || true)" != "$prefix/venv/bin/kinflow" ]; then
    echo "error: $bin/kinflow is there and not ours: remove it, then call this again" >&2
    exit 2
fi
ln -sf "$prefix/venv/bin/kinflow" "$bin/kinflow"

mkdir -p "$state"
"$prefix/venv/bin/kinflow" tune "$prefix/families/$family" --out "$state/tuned.toml"
if [ -e "$settings/device.toml" ]; then
    # Only a bundle of ours: one that its owner put elsewhere stays named.
    sed -i "s|^\(bundle = \"$prefix/families/\)[^\"]*|\1$family|" "$settings/device.toml"
else
    sed "s|@bundle@|$prefix/families/$family|; s|@state@|$state|" "$here/$board/device.toml" >"$settings/device.toml"
fi

if [ -n "$service" ]; then
    id kinflow >/dev/null 2>&1 ||
        useradd --system --user-group --no-create-home --home-dir "$state" --shell /usr/sbin/nologin kinflow
    # Cameras belong to this group on both boards.
    if grep -q '^video:' /etc/group; then usermod --append --groups video kinflow; fi
    chown -R kinflow: "$state"
    mkdir -p "$units/$unit.d"
    cp "$here/$unit" "$units/$unit"
    cp "$here/$board/service.conf" "$units/$unit.d/board.conf"
    systemd daemon-reload
    # Enabling makes a link: an image that is being built starts the service at its first boot.
    ! installed systemctl || systemctl enable --quiet "$unit"
    systemd restart "$unit"
    echo "kinflow-device.service is installed: journalctl -u kinflow-device"
else
    case ":$PATH:" in *":$bin:"*) ;; *) echo "add $bin to your PATH, or log in again" ;; esac
fi
echo "settings: $settings/device.toml; next: kinflow doctor --bundle $prefix/families/$family"
