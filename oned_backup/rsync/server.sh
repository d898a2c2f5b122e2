# shellcheck shell=sh
# Runs on the server, given to `sh -c`: everything that changes a store besides rsync itself.
#
#     sh -c TEXT sh VERB BASE_PATH ARGUMENT…
#
# It takes a POSIX shell and coreutils. Answers are lines `odb KEY VALUE…` on standard output; what
# a login shell prints besides is passed over. Exit codes are those of oned_backup.errors, and the
# last line on standard error is the message.
set -u
LC_ALL=C
export LC_ALL
umask 077
fail() { code=$1; shift; echo "$*" >&2; exit "$code"; }
try() { "$@" || exit 1; }       # the program has said why
is_folder() { [ -d "$1" ] && [ ! -L "$1" ]; }
there() { [ -e "$1" ] || [ -L "$1" ]; }

echo "odb begun"
verb=$1 base=$2 marker=.oned-backup-store id=
shift 2
[ -d "$base" ] || fail 69 "$base is not there: create the directory there, or mount it"
cd -P -- "$base" || exit 1

# $1: what the catalogue has here: 0, nothing; 1, backups; else the id of the store with the backups.
# Beneath a file system that is not mounted there is neither the marker nor a backup.
require_store() {
    if there $marker; then
        { read -r version; read -r id; } <$marker
        [ "$version" = "oned-backup store, version 1" ] ||
            fail 78 "$base/$marker: not a store of a version that this program knows"
        case $1 in
        0 | 1 | "$id") return ;;
        *) fail 69 "$base/$marker: this is store ${id:-without id}, not $1; is another disk mounted there?" ;;
        esac
    fi
    [ "$1" != 0 ] || return 0
    for entry in [0-9]*/[!.]*; do
        ! is_folder "$entry" || return 0
    done
    fail 69 "$base has no $marker, but backups are known to be there; is it mounted?"
}

mark() {
    there $marker && return
    case $1 in
    0 | 1) id=$(od -An -v -N16 -tx1 /dev/urandom | tr -d ' \n') ;;
    *) id=$1 ;;
    esac
    printf 'oned-backup store, version 1\n%s\n' "$id" >"$marker.$$" && sync "$marker.$$" || exit 1
    ln "$marker.$$" $marker 2>/dev/null || there $marker || mv "$marker.$$" $marker || exit 1
    rm -f "$marker.$$"
    try sync .
    id=
    { read -r version; read -r id; } <$marker   # another one may have been quicker
}

enter() {                       # the folder of VM $1; made if $2 is `make`
    if [ "${2:-}" = make ]; then
        there "$1" || mkdir "$1" 2>/dev/null || is_folder "$1" || try mkdir "$1"
        try sync .              # also if it is there: whoever made it may have died before this
    fi
    there "$1" || return 1
    is_folder "$1" || fail 65 "$base/$1 is not what a store has there"
    cd -P "$1" || exit 1
}

discard() {                     # a receiving rsync whose client is gone may still write there
    rm -rf -- "$1" 2>/dev/null || try rm -rf -- "$1"
}

case $verb in
monitor)                        # KNOWN
    require_store "$1"
    ;;
prepare)                        # KNOWN VM ID PARENT: where to put a backup, and what is there of it
    require_store "$1"
    mark "$1"
    [ -z "$id" ] || echo "odb store $id"
    enter "$2" make
    [ -z "${4:-}" ] || there "$4" || echo "odb parent no"
    if there "$3"; then
        is_folder "$3" || fail 65 "$base/$2/$3 is not what a store has there"
        try sync .
        echo "odb finished"
    else
        partial=.partial-$3
        there "$partial" || try mkdir "$partial"
        is_folder "$partial" || fail 65 "$base/$2/$partial is not what a store has there"
        cd -P "$partial" || exit 1
        for file in * .[!.]*; do
            there "$file" || continue
            case $file in .* | manifest.json) discard "$file" && continue ;; esac
            if [ -f "$file" ] && [ ! -L "$file" ] && [ -s "$file" ]; then
                # Shorter by a byte: rsync proves what it continues, and passes over what has its length.
                try truncate -s -1 -- "$file"
                echo "odb file $(stat -c '%s %n' -- "$file")"
            else
                discard "$file"
            fi
        done
    fi
    ;;
receive)                        # VM ID FILE OFFSET: standard input is the rest of the file
    enter "$1" || fail 66 "$base/$1 is absent"
    cd -P ".partial-$2" || exit 1
    # At its place, not appended: what an earlier dd still gets is the same there.
    try dd of="$3" bs=1M iflag=fullblock oflag=seek_bytes seek="$4" conv=notrunc status=none
    digest=$(sha256sum <"$3") || exit 1
    echo "odb digest ${digest%% *}"
    ;;
publish)                        # VM ID LENGTH [FILE LENGTH]…: on standard input the heads of the files, the manifest
    vm=$1 id=$2 length=$3
    shift 3
    enter "$vm" || fail 66 "$base/$vm is absent"
    cd -P ".partial-$id" || exit 1
    while [ $# -gt 0 ]; do
        try dd of="$1" bs=1M iflag=fullblock,count_bytes count="$2" conv=notrunc status=none
        shift 2
    done
    set -- *
    # A failed sync is final: the kernel may have dropped the data and report success the next time.
    if ! { ! there "$1" || sync -- "$@"; } || ! { cat >.manifest && sync .manifest; }; then
        cd .. && discard ".partial-$id"
        exit 1
    fi
    [ "$(stat -c %s .manifest)" = "$length" ] || fail 69 "the manifest was cut off"
    try mv .manifest manifest.json
    try sync .
    cd ..
    there "$id" && fail 4 "$base/$vm/$id exists already"
    try mv -T ".partial-$id" "$id"
    try sync .
    ;;
cancel)                         # KNOWN VM ID: what an unfinished backup left
    require_store "$1"
    if enter "$2"; then
        discard ".partial-$3"
        cd -P .. && rmdir "$2" 2>/dev/null
    fi
    ;;
remove)                         # KNOWN VM ID…: first the name, then the data
    require_store "$1"
    vm=$2
    shift 2
    if enter "$vm"; then
        for id; do
            discard ".removing-$id"
            if there "$id"; then
                try mv -T "$id" ".removing-$id"
                try sync .
                discard ".removing-$id"
            fi
            discard ".partial-$id"
        done
        cd -P .. && rmdir "$vm" 2>/dev/null
    fi
    ;;
*) fail 64 "no verb $verb" ;;
esac
size=$(df --block-size=1 --output=size,used,avail .) || exit 1
echo "odb space $(echo "$size" | tail -n 1)"
