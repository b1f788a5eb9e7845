#!/bin/sh
# Fetches what an emulated arm64 board is made of: the emulator, a Debian root, aarch64 wheels. Each part once.
# usage: prepare.sh CACHE [machine]      (root; Debian 12 or newer, or Ubuntu with debian-archive-keyring)
# With `machine` also what boots: a root with systemd, a kernel, and the emulator of a whole machine.
set -eu
cache=$(realpath -m "${1:?usage: prepare.sh CACHE [machine]}")
machine=${2:-}
project=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
pip="$python -m pip --disable-pip-version-check --quiet"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$cache"

need() { # need PROGRAM PACKAGE
    command -v "$1" >/dev/null && return
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends "$2" >/dev/null
}

debian_mirror() { # the one that apt uses here, so that a machine behind a proxy or a mirror keeps to it
    apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n 1
}

# Debian 13's qemu-user, one static file: 7.2 of Debian 12 knows neither IP_MULTICAST_IF nor what onnxruntime asks for.
emulator() {
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    mirror=$(debian_mirror)
    echo "deb [signed-by=$keyring] ${mirror:-http://deb.debian.org/debian} trixie main" >"$work/sources.list"
    : >"$work/status"
    set -- -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o "Dir::State::status=$work/status" \
        -o APT::Sandbox::User=root
    apt-get "$@" update
    (cd "$work" && apt-get "$@" download qemu-user)
    dpkg-deb --fsys-tarfile "$work"/qemu-user_*.deb | tar -x -C "$work" ./usr/bin/qemu-aarch64
    mv "$work/usr/bin/qemu-aarch64" "$cache/qemu-aarch64"
    rm -r "$work"
}

# Unpacked only: no maintainer script runs, so not one arm64 instruction is needed.
root() { # root DIRECTORY PACKAGES
    need mmdebstrap mmdebstrap
    need arch-test arch-test
    rm -rf "$1.part"
    # shellcheck disable=SC2046 # no mirror, no word
    mmdebstrap --quiet --architectures=arm64 --variant=extract --keyring="$keyring" --include="$2" \
        bookworm "$1.part" $(debian_mirror)
    rm -rf "$1.part/dev" # device nodes, which a copy of the root would read without end
    mkdir -p "$1.part/proc" "$1.part/sys" "$1.part/dev" "$1.part/run" "$1.part/tmp" "$1.part/root"
    [ -e "$1.part/bin/sh" ] || ln -s dash "$1.part/bin/sh"
    echo "127.0.0.1 localhost" >"$1.part/etc/hosts"
    printf 'root:x:0:0::/root:/bin/sh\n' >"$1.part/etc/passwd"
    printf 'root:x:0:\nvideo:x:44:\n' >"$1.part/etc/group"
    printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$1.part/etc/nsswitch.conf"
    # Compiled here: an emulated processor takes minutes for it.
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' &&
        "$python" -m compileall -q -s "$1.part" "$1.part/usr/lib/python3.11" >/dev/null || true
    mv "$1.part" "$1"
}

# Debian's kernel for virtual machines; its disk and network drivers are modules, so it needs an initrd.
kernel() {
    need cpio cpio
    need depmod kmod
    rm -rf "$cache/kernel.part"
    # shellcheck disable=SC2046
    mmdebstrap --quiet --architectures=arm64 --variant=extract --keyring="$keyring" \
        --include=linux-image-cloud-arm64,busybox-static bookworm "$cache/kernel.part" $(debian_mirror)
    rm -rf "$cache/kernel.part/dev"
    depmod -b "$cache/kernel.part" "$(ls "$cache/kernel.part/lib/modules")"
    mv "$cache/kernel.part" "$cache/kernel"
}

initrd() { # initrd MODULE...: loads them with what they depend on, then goes over to /dev/vda
    modules=$(echo "$cache"/kernel/lib/modules/*)
    work=$(mktemp -d)
    mkdir -p "$work/bin" "$work/modules" "$work/proc" "$work/sys" "$work/dev" "$work/root"
    cp "$cache/kernel/bin/busybox" "$work/bin/busybox"
    for name; do
        file=$(cd "$modules" && find . -name "$name.ko*" | sed 's|^\./||' | head -n 1)
        [ -n "$file" ] || continue # built in
        # What is needed first stands last in modules.dep.
        for each in $(sed -n "s|^$file: *||p" "$modules/modules.dep" | tr ' ' '\n' | tac) "$file"; do
            [ -e "$work/modules/$(basename "$each")" ] || basename "$each" >>"$work/order"
            cp "$modules/$each" "$work/modules/"
        done
    done
    cat >"$work/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done </order
while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /root
for each in dev proc sys; do /bin/busybox mount --move /$each /root/$each; done
exec /bin/busybox switch_root /root /lib/systemd/systemd
INIT
    chmod +x "$work/init"
    (cd "$work" && find . | cpio --quiet -o -H newc | gzip -1) >"$cache/initrd.gz.part"
    mv "$cache/initrd.gz.part" "$cache/initrd.gz"
    rm -r "$work"
}

# Binary wheels alone, as a board without a compiler gets them.
wheels() {
    rm -rf "$cache/wheels.part"
    mkdir "$cache/wheels.part"
    $pip wheel --no-deps --wheel-dir "$cache/wheels.part" "$project"
    platforms=--platform=manylinux2014_aarch64
    for minor in 24 26 27 28 31 34 35; do # of glibc; Debian 12 has 2.36
        platforms="$platforms --platform=manylinux_2_${minor}_aarch64"
    done
    for wanted in '[onnx,tflite,cli]' '[tflite-runtime,cli]'; do
        $pip download --dest "$cache/wheels.part" --find-links "$cache/wheels.part" --only-binary=:all: \
            --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none $platforms \
            "kinflow$wanted" pytest pytest-timeout hypothesis
    done
    rm -f "$cache"/wheels.part/kinflow-*.whl
    mv "$cache/wheels.part" "$wheels"
}

# One at a time: test runs beside each other share the cache.
exec 9>"$cache/.lock"
flock 9
[ -x "$cache/qemu-aarch64" ] || emulator
packages=python3,python3-venv,libstdc++6,libgomp1,dash,coreutils,sed,grep,login,passwd,util-linux,findutils
[ -d "$cache/root" ] || root "$cache/root" "$packages"
if [ -n "$machine" ]; then
    need qemu-system-aarch64 qemu-system-arm
    need mke2fs e2fsprogs
    [ -d "$cache/machine" ] || root "$cache/machine" "$packages,systemd,systemd-sysv,mount"
    [ -d "$cache/kernel" ] || kernel
    [ -e "$cache/initrd.gz" ] || initrd virtio_mmio virtio_blk ext4
fi
# Anew whenever a dependency has changed, or what is done here with them.
wanted='/^dependencies = /,/^]/p; /^onnx = /p; /^tflite/p; /^cli = /p'
made_of=$(sed -n "$wanted" "$project/pyproject.toml" && sed -n '/^wheels()/,/^}/p' "$0")
wheels=$cache/wheels-$(echo "$made_of" | sha256sum | cut -c1-12)
[ -d "$wheels" ] || wheels
echo "$wheels"
