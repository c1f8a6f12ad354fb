#!/usr/bin/env bash
# Runs a command of README.md in a Debian root that has nothing but the packages which README.md names.
#
#   tests/install/bare_root.sh FOLDER ["make demo"]
#
# FOLDER is made and removed again. Needs root, debootstrap and the package sources of this machine, which are
# used as they are set here. Says SKIPPED, and why, where no such root can be made; fails if the command fails.
set -euo pipefail

skip() {
    echo "SKIPPED: $*"
    exit 0
}

root=$(realpath -m "${1:?"got no argument, expected a folder to make: bare_root.sh FOLDER [COMMAND]"}")
command=${2:-make demo}
cd "$(dirname "$0")/../.."
if [ -e "$root" ]; then
    echo "$root: exists, expected a folder to make, which is removed at the end: choose another" >&2
    exit 2
fi
[ "$(id -u)" = 0 ] || skip "only root may use chroot"
type debootstrap > /dev/null 2>&1 || skip "debootstrap is not installed: apt-get install debootstrap"
unshare --mount true 2> /dev/null || skip "this machine allows no mounts, which would show /proc in the root"
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
# shellcheck disable=SC2016  # apt-get replaces these variables
mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' | awk -v suite="$suite" '$1 == suite { print $2; exit }') || true
[ -n "$mirror" ] || skip "apt-get knows no source of packages for '$suite'"
read -ra packages <<< "$(sed -n 's/.*`apt-get install \([^`]*\)`.*/\1/p' README.md)"

# Everything is mounted in a namespace of its own, so the removal never reaches what the mounts show.
trap 'rm -rf --one-file-system "$root" "$root.log"' EXIT
mkdir -p "$(dirname "$root")"
SECONDS=0
debootstrap --variant=minbase "$suite" "$root" "$mirror" > "$root.log" 2>&1 \
    || skip "debootstrap failed: $(tail -n 1 "$root.log")"
echo "debootstrap: $SECONDS s"

apt-config dump | grep -i '^Acquire::.*Proxy' > "$root/etc/apt/apt.conf.d/00proxy" || true
cp /etc/resolv.conf "$root/etc/resolv.conf"
# Folders of packages on this machine that pip is set to use; an index in DIR/simple links to files beside it.
mapfile -t folders < <(python3 -m pip config list 2> /dev/null | grep -oE "/[^' ]+" | sed 's|^//*|/|; s|/simple$||' | sort -u)
mapfile -t settings < <(env | grep -E '^(PIP|SSL|REQUESTS|CURL)_|^[a-zA-Z]+_(proxy|PROXY)=')
mkdir "$root/clone"
git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C "$root/clone"

run() {
    SECONDS=0
    unshare --mount bash -c '
        set -euo pipefail
        root=$1
        mount -t proc proc "$root/proc"
        shift
        while [ "$1" != -- ]; do
            if [ -d "$1" ]; then
                mkdir -p "$root$1"
                mount --bind -o ro "$1" "$root$1"
            fi
            shift
        done
        shift
        exec chroot "$root" "$@"
    ' - "$root" "${folders[@]}" -- /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        "${settings[@]}" sh -ec "$1" || return
    echo "$1: $SECONDS s"
}

run "apt-get update -q > /dev/null" || skip "apt-get has no packages here"
run "DEBIAN_FRONTEND=noninteractive apt-get install -qq -o Dpkg::Use-Pty=false --no-install-recommends ${packages[*]} > /dev/null" \
    || skip "apt-get cannot install ${packages[*]}"
# After the packages, of which ca-certificates writes to the same folder.
for path in /etc/ssl/certs /etc/pip.conf /etc/xdg/pip; do
    if [ -e "$path" ]; then
        mkdir -p "$root$(dirname "$path")"
        rm -rf "${root:?}$path"  # a link to a file outside the root would be followed
        cp -rLT "$path" "$root$path"
    fi
done
run "cd /clone && $command"
