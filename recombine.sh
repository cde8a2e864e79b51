#!/usr/bin/env bash
# usage: ./recombine.sh [--model NAME] [ckpt|safetensors|all]
#
# Join the chunk files in chunks/NAME/ and its folders into files in output/NAME/, without
# Python. The default model, csm-1b, goes from chunks/ckpt/ and chunks/safetensors/ to output/.
# The name of one such folder chooses it; without it, those are taken that have chunk files.
#
# SHA256SUMS beside the chunk files lists their digests and, in a comment, the joined file's. All
# are checked before anything is written, and the joined file is before it is renamed. (bash 3.2)
#
# exit codes: 0 done, 2 usage, 3 chunk files are missing or not pulled, 4 wrong content or not
#             readable, 7 not enough disk or not writable, 130 interrupted

set -euo pipefail; shopt -s nullglob dotglob
export LC_ALL=C CDPATH=
unseen=$'[[:cntrl:]]|\xc2[\x80-\x9f\xad]|\xd8\x9c|\xe1\xa0[\x8b-\x8f]|\xe2\x80[\x8b-\x8f\xa8-\xae]'
unseen+=$'|\xe2\x81[\xa0-\xaf]|\xe3\x85\xa4|\xef(\xb8[\x80-\x8f]|\xbb\xbf|\xbe\xa0)|\xf3\xa0'
show() { if [[ $* =~ $unseen ]]; then printf '%q\n' "$*"; else printf '%s\n' "$*"; fi; }
say() { show "$@" >&2; }
die() { say "recombine.sh: $2"; exit "$1"; } # CODE MESSAGE
finding() { # WHERE KIND EXPECTED FOUND HELP
  say "  $1: $2: expected $3, found $4 -> $5"
  if [[ $2 != missing && $2 != git-lfs* ]]; then code=4; else code=$((code ? code : 3)); fi
}
sha() { if command -v "sha$1sum" >/dev/null; then "sha$1sum"; else shasum -a "$1"; fi; }
digest() { sha "$1" | cut -d ' ' -f 1; } # BITS: of stdin

files=() sizes=() wholes=() blobs=() # the joined files, as FOLDER/NAME, and what they must be
starts=() chunks=() sums=()          # a file's chunk files go from its start to that of the next
about='^# ([^/]+): ([1-9][0-9]{0,14}) bytes'
about+='(, sha256 ([0-9a-f]{64}))?(, Hub blob id ([0-9a-f]{40}))?$'
sum='^([0-9a-f]{64}) [ *]([^/]+)$'
read_list() { # FOLDER: append what its SHA256SUMS says
  local list=$1/SHA256SUMS line n='' help="git checkout $1, or chmod u+rwx $1" kind=missing
  while IFS= read -r line || [[ $line ]]; do
    line=${line%$'\r'}
    if [[ $line =~ $about && ${BASH_REMATCH[3]}${BASH_REMATCH[5]} ]]; then
      n=${#files[@]} files[n]=$1/${BASH_REMATCH[1]} sizes[n]=${BASH_REMATCH[2]}
      wholes[n]=${BASH_REMATCH[4]} blobs[n]=${BASH_REMATCH[6]} starts[n]=${#chunks[@]}
    elif [[ $n && $line =~ $sum && $1/${BASH_REMATCH[2]} == "${files[n]}".part-* ]]; then
      chunks+=("$1/${BASH_REMATCH[2]}") sums+=("${BASH_REMATCH[1]}")
    elif [[ $line && $line != '#'* ]]; then
      finding "$list" malformed "lines as inv split writes them" "$line" "$help"
      break
    fi
  done < <(if [[ -r $1 && -f $list && -s $list ]]; then head -c 1000000 "$list"; fi)
  [[ -r $1 && -x $1 ]] || kind=unreadable
  [[ $n$line ]] || finding "$list" "$kind" "a list of chunk files" none "$help"
}
real() { readlink -f "$1" 2>/dev/null || (cd -P "$(dirname "$1")" && echo "$PWD/${1##*/}"); }
check_chunk() { # FILE SHA256; after an interrupt in $(), bash 5.2 cannot read another of its command
  local kind=missing found folder; [[ ! -s $1 || -r $1 ]] || kind=unreadable
  if [[ ! -f $1 || ! -r $1 || ! -s $1 ]]; then
    finding "$1" "$kind" "a chunk file" "none that can be read, or an empty one" "$help"
  elif found=$(real "$1"); folder=$(cd -P chunks && pwd); [[ $found != "$folder"/* ]]; then
    finding "$1" "path not usable" "a file inside chunks/" "a link out of it" "copy it there"
  elif head -c 64 "$1" | grep -aq '^version https://git-lfs.github.com/spec/v1'; then
    finding "$1" "git-lfs pointer" "a chunk file" "a pointer to it" "git lfs pull"
  elif say "checking $1"; found=$(digest 256 <"$1"); [[ $found != "$2" ]]; then
    finding "$1" "wrong digest" "sha256 $2" "another in $(($(wc -c <"$1"))) bytes" "$help"
  fi
}
check_file() { # FILE INDEX: whether it is what the list says; sets found
  local pointer
  found=$(digest 256 <"$1") || return 1
  # The Hub's id of a large file is the git blob id of its LFS pointer.
  printf -v pointer 'version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %s\n' \
    "$found" "${sizes[$2]}"
  pointer=$(printf 'blob %s\0%s' ${#pointer} "$pointer" | digest 1)
  [[ ${wholes[$2]:-$found} == "$found" && ${blobs[$2]:-$pointer} == "$pointer" ]]
}

model=csm-1b format='' partial='' code=0
trap 'if [[ -f $partial ]]; then rm -f "$partial"; fi' EXIT
trap 'say "recombine.sh: interrupted; what was there before is as it was"; exit 130' INT TERM HUP
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --model) model=${2-}; shift $(($# > 1)) ;;
    --model=*) model=${1#*=} ;;
    *) [[ $1 != -* && -z $format ]] || die 2 "cannot use \"$1\" here; see --help"; format=$1 ;;
  esac
  shift
done
cd -P "$(dirname "$(real "${BASH_SOURCE[0]}")")"
[[ $model != */* && -f manifests/$model.toml ]] || die 2 "no manifests/$model.toml"
folders=("chunks/$model" "chunks/$model"/*/) output=output/$model
[[ $model != csm-1b ]] || folders=(chunks/ckpt chunks/safetensors) output=output
get="git restore chunks"; if grep -qs filter=lfs .gitattributes; then get="git lfs pull"; fi
help="$get, copy the file again, or make weights MODEL=$model"
for folder in "${folders[@]%/}"; do
  here=("$folder"/*.part-*)
  if [[ $format == "${folder##*/}" || $format == all && -f $folder/SHA256SUMS || -z ${format#all} &&
    (${#here[@]} != 0 || -e $folder && ! -r $folder) ]]; then read_list "$folder"; fi
done
((${#files[@]} + code > 0)) ||
  die $((${#format} ? 2 : 3)) "no chunk files${format:+ called $format} in ${folders[*]} -> $help"
for ((i = 0; i < ${#chunks[@]}; i++)); do check_chunk "${chunks[i]}" "${sums[i]}"; done
((code == 0)) || die "$code" "nothing was written; see above"
starts+=("${#chunks[@]}")
for ((n = 0; n < ${#files[@]}; n++)); do
  final=$output/${files[n]##*/}
  if [[ -f $final ]] && check_file "$final" "$n"; then
    show "$final: already right, kept (sha256 $found)"; continue
  fi
  for left in "$final".recombine-partial.*; do # of runs that were killed
    if [[ -f $left && $(kill -0 "${left##*.}" 2>&1) == *"No such proc"* ]]; then rm "$left"; fi
  done
  say "writing $final"
  partial=$final.recombine-partial.$$ parts=("${chunks[@]:starts[n]:starts[n + 1] - starts[n]}")
  { mkdir -p "$output" && rm -f "$partial" && cat "${parts[@]}" </dev/null >"$partial" && sync; } ||
    die 7 "$final: cannot be written, see above; the partial file was removed"
  check_file "$partial" "$n" || die 4 "$final: wrong content, sha256 $found; the chunk files were \
right, so the disk or memory failed, or the list is wrong -> git checkout ${files[n]%/*}"
  [[ -f $final || ! -e $final ]] || die 4 "$final: path not usable -> move it away"
  mv -f "$partial" "$final" || die 7 "$final: cannot be replaced, see above"; partial=''
  show "$final: joined (sha256 $found)"
done
sync # the new names too
say "Next: make weights MODEL=$model, which installs and verifies the files in $output/"
