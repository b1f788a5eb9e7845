#!/bin/sh
# Installs kinflow here; ../install.sh lists the options.
exec sh "$(dirname "$0")/../install.sh" jetson "$@"
