# make serve and make test are all a newcomer needs: on Debian 12 they install what is missing,
# make the virtual environment, build the native core in place, and go on.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The one list of Debian packages. Users of `serve` need the first three lines only, but a machine
# that has all of them can run everything, and one list cannot disagree with itself.
PACKAGES := \
	python3-venv python3-dev gcc libc6-dev make pkg-config \
	liburing-dev \
	nbd-client \
	fuse3 libfuse3-dev \
	nbdkit nbdkit-plugin-python nbdkit-plugin-dev gnutls-bin libnbd-bin python3-libnbd \
	qemu-utils fio e2fsprogs xfsprogs zstd \
	qemu-system-x86 qemu-system-common busybox-static cpio \
	systemd iproute2 \
	tgt libiscsi-bin open-iscsi qemu-block-extra \
	clang libclang-rt-14-dev

# The kernel tests/kernel boots; downloaded and unpacked, never installed.
KERNEL_PACKAGE := linux-image-cloud-amd64

PYTHON ?= $(shell for p in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && \
	{ echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps
VOLUME ?= demo
SIZE ?= 10G

NATIVE := setup.py native/build.py native/cdef.h \
	$(wildcard native/include/*.h native/src/*.h native/src/*.c)
MODULES := $(shell find lhblock -name '*.py' -not -name '*_pb2*.py')

.PHONY: help packages venv native native-asan native-tsan test-asan test-tsan serve test check lint unit test-native \
	test-native-asan test-native-tsan fuzz bench wheel proto kernel \
	tgt-plugin install-tgt-plugin nbdkit-plugin install-nbdkit-plugin clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 18

# ---- What everything stands on.

packages:  ## install the Debian packages that are missing (root or password-less sudo)
	@missing=; for p in $(PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=" $$p"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "not Debian; needed here:$$missing" >&2; exit 0; }; \
	sudo=; [ $$(id -u) -eq 0 ] || sudo='sudo -n'; \
	$$sudo true 2>/dev/null || { echo "missing packages, run: apt-get install$$missing" >&2; exit 1; }; \
	echo "installing$$missing"; \
	case "$$missing " in *" tgt "*) \
	  [ ! -d /run/systemd/system ] || { echo "masking tgt.service, which would listen on all addresses"; \
	    $$sudo systemctl -q mask tgt.service; };; \
	esac; \
	log=$$(mktemp); export DEBIAN_FRONTEND=noninteractive; \
	{ $$sudo apt-get update -q && \
	  $$sudo apt-get install -q -y --no-install-recommends $$missing; } >$$log 2>&1 \
	  || { cat $$log >&2; exit 1; }; rm -f $$log

$(STAMPS)/venv: pyproject.toml constraints.txt setup.py | packages
	@mkdir -p $(@D)
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer found" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "filling $(VENV)"
	@LHB_NATIVE=no $(BIN)/python -m pip install -qq --disable-pip-version-check \
	  -c constraints.txt -e '.[dev]'
	@touch $@

venv: $(STAMPS)/venv  ## the virtual environment, from constraints.txt

$(STAMPS)/native: $(NATIVE) $(STAMPS)/venv
	@rm -f build/temp.*/liblhb.a  # or it keeps the objects of sources that are gone
	$(BIN)/python setup.py -q build_clib build_ext --inplace
	@touch $@

native: $(STAMPS)/native  ## the cffi module, in place

# Sanitised copies of the package. To use one:
#   PYTHONPATH=build/asan/lib LD_PRELOAD=$(gcc -print-file-name=libasan.so) .venv/bin/pytest ...
$(STAMPS)/native-asan: export LHB_SANITIZE := address,undefined
$(STAMPS)/native-tsan: export LHB_SANITIZE := thread
$(STAMPS)/native-asan $(STAMPS)/native-tsan: $(STAMPS)/native-%: $(NATIVE) $(MODULES) $(STAMPS)/venv
	$(BIN)/python setup.py -q build --build-base build/$* --build-lib build/$*/lib
	@touch $@

native-asan: $(STAMPS)/native-asan  ## build/asan/lib: the package with ASan and UBSan
native-tsan: $(STAMPS)/native-tsan  ## build/tsan/lib: the package with TSan

# The backing store that tgtd loads; its headers are those of the tgt that is installed, and only a
# tgtd of that version is given it.
TGT_SOURCE := build/tgt-source
TGT_MODULE = lhblock/frontend/tgt/bs_lhblock-$(shell cat $(TGT_SOURCE)/version 2>/dev/null).so
PLUGIN_CFLAGS := -std=gnu11 -D_GNU_SOURCE -O2 -g -fPIC -shared -pthread -fno-strict-aliasing \
	-fvisibility=hidden -fstack-protector-strong -Wall -Wextra -Wshadow -Wconversion -Werror
PLUGIN_HEADERS := native/include/lhb_bytes.h native/include/lhb_nbd.h native/include/lhb_util.h

$(TGT_SOURCE)/version: | packages
	@plugins/tgt/fetch-source $(TGT_SOURCE)

$(STAMPS)/tgt-plugin: $(wildcard plugins/tgt/*.c plugins/tgt/*.h) $(PLUGIN_HEADERS) \
		$(TGT_SOURCE)/version
	@mkdir -p $(@D)
	@rm -f lhblock/frontend/tgt/bs_lhblock-*.so
	$(CC) $(PLUGIN_CFLAGS) -isystem $(TGT_SOURCE)/usr -Inative/include plugins/tgt/*.c -o $(TGT_MODULE)
	@touch $@

tgt-plugin: $(STAMPS)/tgt-plugin  ## the backing store for tgtd (fetches tgt's source package)

install-tgt-plugin: tgt-plugin  ## ... where a tgtd that runs already looks for it (root)
	install -D -m 644 $(TGT_MODULE) /usr/lib/tgt/backing-store/bs_lhblock.so

# The plugin that nbdkit loads. nbdkit's interface is stable, so any nbdkit of this machine takes it.
# The second copy is the same with a sanitiser, for the tests.
NBDKIT_MODULE := lhblock/frontend/nbd/nbdkit-lhblock-plugin.so
NBDKIT_SANITIZED := build/asan/nbdkit-lhblock-plugin.so
NBDKIT_SOURCE := $(wildcard plugins/nbdkit/*.c)
NBDKIT_HEADERS := $(wildcard plugins/nbdkit/*.h) $(PLUGIN_HEADERS)

$(NBDKIT_MODULE): $(NBDKIT_SOURCE) $(NBDKIT_HEADERS) | packages
	$(CC) $(PLUGIN_CFLAGS) -Inative/include $(NBDKIT_SOURCE) -o $@

$(NBDKIT_SANITIZED): $(NBDKIT_SOURCE) $(NBDKIT_HEADERS) | packages
	@mkdir -p $(@D)
	$(CC) $(PLUGIN_CFLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all \
	  -Inative/include $(NBDKIT_SOURCE) -o $@

nbdkit-plugin: $(NBDKIT_MODULE) $(NBDKIT_SANITIZED)  ## the plugin for nbdkit, in C

install-nbdkit-plugin: nbdkit-plugin  ## ... where nbdkit looks for the name lhblock (root)
	install -D -m 644 $(NBDKIT_MODULE) \
	  "$$(nbdkit --dump-config | sed -n s/^plugindir=//p)/nbdkit-lhblock-plugin.so"

build/kernel/vmlinuz: | packages
	@tests/kernel/fetch-kernel $(KERNEL_PACKAGE) build/kernel

kernel: build/kernel/vmlinuz  ## the Debian kernel of the kernel tests, unpacked into build/

# ---- Use.

serve: native  ## serve a volume: VOLUME=demo SIZE=10G
	@exec $(BIN)/lhblock serve $(VOLUME) --size $(SIZE)

# ---- Tests.

test: lint test-native test-native-asan test-native-tsan test-asan test-tsan native tgt-plugin nbdkit-plugin kernel  ## everything
	$(BIN)/pytest

check: lint test-native unit  ## the fast part of it

unit: native
	$(BIN)/pytest -q tests/unit tests/model

lint: venv  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases plugins/nbdkit/lhblock.py

test-native: packages  ## the C unit tests
	$(MAKE) -C native test VARIANT=plain

test-native-asan: packages  ## the C unit tests under ASan and UBSan
	$(MAKE) -C native test VARIANT=asan

test-native-tsan: packages  ## the C unit tests under TSan
	$(MAKE) -C native test VARIANT=tsan

# Python itself is not sanitised, and leaks a little by design.
test-asan: native-asan  ## the model tests on a core with ASan and UBSan
	PYTHONPATH=build/asan/lib LD_PRELOAD=$$(gcc -print-file-name=libasan.so) \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/pytest -q tests/model

test-tsan: native-tsan  ## the concurrent model tests on a core with TSan
	PYTHONPATH=build/tsan/lib LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) \
	  TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
	  $(BIN)/pytest -q tests/model/test_volume_concurrent.py

fuzz: packages  ## fuzz every parser of sockets and disks: FUZZ_SECONDS=60
	$(MAKE) -C native fuzz

bench: native tgt-plugin nbdkit-plugin  ## us and the peers, interleaved: BENCH_ROUNDS=5 BENCH_SECONDS=3
	$(BIN)/python -m tests.bench

wheel: venv  ## dist/: sdist and wheel
	$(BIN)/python -m build --no-isolation

proto: venv  ## generate the Python code of lhblock/rpc/*.proto
	$(BIN)/python -m lhblock.rpc.generate

clean:  ## what was built; volumes are not touched
	rm -rf build dist *.egg-info lhblock/*.so lhblock/frontend/*/*.so
	@[ ! -e native/Makefile ] || $(MAKE) -C native clean
