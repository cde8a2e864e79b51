#!/usr/bin/env bash
# Joins the parts under chunks/ into the weight files, for people without Python.
#
# Every part is proven against manifests/NAME.toml before anything is written: a bad part
# is then named while it has cost nothing. The joined file is proven once more before it
# gets its final name, because writing can fail as well.
# Runs with bash 3.2 (macOS), and with GNU or BSD tools.
set -euo pipefail
export LC_ALL=C
unset CDPATH

usage() {
  cat <<'HELP'
usage: ./recombine.sh [--model NAME] [ckpt|safetensors|all]

Joins the parts of a model into the directory "staging" of its manifest (output/).
Without a format: every format of which parts are here. Needs no Python.

  --model NAME   the model of manifests/NAME.toml (default: csm-1b)
  --list         only print what the manifest says of the parts, one a line:
                 artifact, part, offset, size (bytes), sha256, with tabs between them
  -h, --help     this text

exit codes: 0 done, 1 usage, 3 parts are missing or not pulled, 4 wrong content,
            7 not enough disk or not writable, 130 interrupted
HELP
}

say() { printf '%s\n' "$*" >&2; }
die() { say "recombine.sh: $2"; exit "$1"; } # CODE MESSAGE

missing=0 wrong=0
finding() { # WHERE KIND EXPECTED FOUND HELP
  say "  $1: $2: expected $3, found $4 -> $5"
  case $2 in
    missing | "git-lfs pointer") missing=$((missing + 1)) ;;
    *) wrong=$((wrong + 1)) ;;
  esac
}
stop_on_findings() {
  if ((wrong)); then die 4 "$((missing + wrong)) finding(s), see above; nothing was written"; fi
  if ((missing)); then die 3 "$missing finding(s), see above; nothing was written"; fi
}

sha() { if command -v "sha$1sum" >/dev/null; then "sha$1sum"; else shasum -a "$1"; fi; }
digest() { local line; line=$(sha "$1") && printf '%s' "${line%% *}"; } # of stdin
size_of() { local n; n=$(wc -c <"$1") && printf '%s' $((n)); }

# Prints the manifest as rows, with tabs between the fields and "-" for an absent one:
#   staging DIR | destination DIR | hub REPO REVISION | bad MESSAGE
#   artifact GROUP PATH SIZE SHA256 BLOB_ID | piece GROUP PATH PART OFFSET SIZE SHA256
# Only artifacts that come in parts. Sizes stay text: some awks print large numbers rounded.
read_manifest() {
  awk -v want="$model" '
    function need(ok, rule) { if (!ok) print "bad\t  " FILENAME ", line " NR ": " rule }
    function code(line,  kept) { # without the comment
      while (match(line, /^[^"#]*"[^"]*"/)) {
        kept = kept substr(line, 1, RLENGTH); line = substr(line, RLENGTH + 1)
      }
      sub(/#.*/, "", line); sub(/[ \t\r]+$/, "", line)
      return kept line
    }
    function value(line, key) {
      key = "(^|[ \t,{])" key "[ \t]*=[ \t]*(\"[^\"]*\"|[0-9]+)[ \t]*([,}]|$)"
      if (!match(line, key)) return ""
      line = substr(line, RSTART, RLENGTH)
      sub(/^[^=]*=[ \t]*"?/, "", line); sub(/"?[ \t,}]*$/, "", line)
      return line
    }
    function is_count(n) { return n ~ /^(0|[1-9][0-9]*)$/ && length(n) < 16 }
    function is_hex(s, n) { return length(s) == n && s !~ /[^0-9a-f]/ }
    function is_path(s) {
      return s ~ /^[A-Za-z0-9._ \/+@-]+$/ && s !~ /^[\/ -]/ && s !~ /(^|\/)\.\.?(\/|$)/
    }
    function piece(line,  part, offset, size, sha) {
      part = value(line, "part"); offset = value(line, "offset")
      size = value(line, "size"); sha = value(line, "sha256")
      pieces++; if (part != "") parts++
      need(part == "" || is_path(part) && !taken[part]++, \
        "the part \"" part "\" is unsafe or there twice")
      need(is_count(offset) && offset + 0 == end, \
        "the offset is \"" offset "\", not " sprintf("%.0f", end) ": a hole or an overlap")
      need(is_count(size) && size > 0, "the size is \"" size "\"")
      need(is_hex(sha, 64), "sha256 is not 64 hex digits")
      end += size
      rows = rows "piece\t" key["group"] "\t" key["path"] "\t" part "\t" \
        offset "\t" size "\t" sha "\n"
    }
    function finish_table() {
      need(!inside, "pieces has no closing bracket"); inside = 0
      if (table == "[[artifact]]" && parts) {
        need(parts == pieces, "some pieces name no part")
        need(is_path(key["path"]) && !taken[key["path"]]++, "the path is unsafe or there twice")
        need(key["group"] ~ /^[a-z0-9_-]+$/, "the group is \"" key["group"] "\"")
        need(is_count(key["size"]) && key["size"] + 0 == end, \
          "the pieces add up to " sprintf("%.0f", end) " bytes, not to \"" key["size"] "\"")
        need(!("sha256" in key) || is_hex(key["sha256"], 64), "sha256 is not 64 hex digits")
        need(!("blob_id" in key) || is_hex(key["blob_id"], 40), "blob_id is not 40 hex digits")
        print "artifact\t" key["group"] "\t" key["path"] "\t" key["size"] "\t" \
          (("sha256" in key) ? key["sha256"] : "-") "\t" (("blob_id" in key) ? key["blob_id"] : "-")
        printf "%s", rows
      } else if (table == "[layout]") {
        need(is_path(key["staging"]), "staging is not a directory below this one")
        print "staging\t" key["staging"] "\ndestination\t" key["destination"]
      } else if (table == "[hub]") {
        need(key["repo"] ~ /^[A-Za-z0-9][A-Za-z0-9_.-]*\/[A-Za-z0-9][A-Za-z0-9_.-]*$/ && \
          is_hex(key["revision"], 40), "no repo ORG/NAME, or no revision of 40 hex digits")
        print "hub\t" key["repo"] "\t" key["revision"]
      } else if (table == "") {
        need(key["schema"] == "1", "the schema is \"" key["schema"] "\", this script reads 1")
        need(key["name"] == want, "the name is \"" key["name"] "\", not " want)
      }
      split("", key); rows = ""; pieces = parts = end = 0
    }
    in_text { gsub(/\\./, ""); in_text = !/"""/; next }
    /^[ \t]*[A-Za-z0-9_-]+[ \t]*=[ \t]*"""/ {
      sub(/"""/, ""); gsub(/\\./, ""); in_text = !/"""/; next
    }
    { line = code($0); sub(/^[ \t]+/, "", line) }
    line == "" { next }
    inside && line == "]" { inside = 0; next }
    inside { need(line ~ /^\{.*\},?$/, "not a piece: " line); piece(line); next }
    line ~ /^\[\[?[A-Za-z0-9_.-]+\]?\]$/ { finish_table(); table = line; found[table] = 1; next }
    line !~ /^[A-Za-z0-9_-]+[ \t]*=/ { need(0, "neither a table nor a key: " line); next }
    {
      name = line; sub(/[ \t]*=.*/, "", name)
      need(!(name in key), "the key " name " is there twice")
      key[name] = value(line, name)
      if (name == "pieces") {
        inside = line ~ /=[ \t]*\[$/; need(inside || line ~ /\[\]$/, "not one piece a line")
      }
    }
    END {
      need(!in_text, "a text has no closing quotes")
      finish_table()
      need(found["[layout]"], "there is no [layout]")
    }' "$manifest"
}

rows() { # KIND: its rows, of the chosen formats
  awk -F '\t' -v kind="$1" -v formats=" $formats " \
    '$1 == kind && index(formats, " " $2 " ")' <<<"$table"
}

looks_right() { # PART SIZE: the checks that need no reading; fails after a finding
  local part=$1 bytes="$2 bytes" found head help="git lfs pull, or copy the part again"
  if [[ ! -e $part ]]; then
    finding "$part" missing "$bytes" "no such file" "$help"
  elif [[ ! -f $part ]]; then
    finding "$part" unreadable "$bytes" "something that is not a file" "$help"
  elif ! { head=$(head -c 64 "$part" | tr -d '\0') && found=$(size_of "$part"); } 2>/dev/null; then
    finding "$part" unreadable "$bytes" "a file that cannot be read" "chmod u+r '$part'"
  elif [[ $head == "version https://git-lfs.github.com/spec/v1"* ]]; then
    finding "$part" "git-lfs pointer" "$bytes" "a pointer of $found bytes" "git lfs pull"
  elif [[ $head == "Access to model "* ]]; then
    finding "$part" "access page" "$bytes" "the Hub's refusal, saved as the file" "$help"
  elif [[ $found != "$2" ]]; then
    finding "$part" "wrong size" "$bytes" "$found bytes" "$help"
  else
    return 0
  fi
  return 1
}

is_consumed() { # PARTIAL SHA256: whether bytes of that part are in the partial only
  local last
  [[ -f $1 && -r $1.journal ]] || return 1
  last=$(grep -F '"consumed":' "$1.journal" | grep -F "$2" | tail -n 1) || :
  [[ $last =~ \"consumed\":\ [1-9] ]]
}

find_extra_parts() {
  local known stem extra
  known=$(rows piece | cut -f 4)
  while IFS= read -r stem; do
    for extra in "$stem".part-*; do
      if [[ -z $stem || (! -e $extra && ! -L $extra) ]]; then continue; fi
      if grep -Fxq -e "$extra" <<<"$known"; then continue; fi
      finding "$extra" "unexpected part" "only the parts in $manifest" "one more" "move it away"
    done
  done <<<"$(sed -n 's/\.part-[^/]*$//p' <<<"$known" | sort -u)"
}

check_parts() { # all of them, so that a person mends everything in one round
  local path part size expected found right=''
  while IFS=$'\t' read -r _ _ path part _ size expected; do
    if is_consumed "$staging/$path.partial" "$expected"; then
      finding "$part" consumed "$size bytes" "a part that make weights moved to \
$staging/$path.partial, in part or whole" "make weights MODEL=$model, which goes on with it"
    elif looks_right "$part" "$size"; then
      right+="$part"$'\t'"$expected"$'\n'
    fi
  done <<<"$(rows piece)"
  find_extra_parts
  while IFS=$'\t' read -r part expected; do
    if [[ -z $part ]]; then continue; fi
    say "checking $part"
    found=$(digest 256 <"$part") || found="an error while reading"
    if [[ $found != "$expected" ]]; then
      finding "$part" "wrong digest" "sha256 $expected" "$found" "git lfs pull, or copy it again"
    fi
  done <<<"$right"
  stop_on_findings
}

proof='' flaw=''
expect() { # WHAT EXPECTED FOUND ("-": nothing is expected)
  if [[ $2 == "$3" ]]; then proof="$1 $2"; fi
  if [[ $2 != - && $2 != "$3" ]]; then flaw="$1 $2, found ${3:-an error while reading}"; fi
}

prove_pieces() { # FILE ARTIFACT: each range of the file has the digest of its piece
  local path part offset size expected found
  while IFS=$'\t' read -r _ _ path part offset size expected; do
    if [[ $path != "$2" ]]; then continue; fi
    # head ends before tail does, which pipefail would call a failure
    found=$(set +o pipefail; tail -c "+$((offset + 1))" "$1" | head -c "$size" | digest 256) || :
    expect "sha256 of the range of $part:" "$expected" "$found"
  done <<<"$(rows piece)"
  proof="every range has the sha256 of its part"
}

prove() { # FILE ARTIFACT SIZE SHA256 BLOB_ID: sets proof; or sets flaw, and fails
  local whole pointer
  proof='' flaw=''
  expect "size in bytes" "$3" "$(size_of "$1" || :)"
  if [[ -z $flaw && $4$5 == -- ]]; then
    prove_pieces "$1" "$2"
  elif [[ -z $flaw ]]; then
    whole=$(digest 256 <"$1") || whole=''
    # The Hub's id of a large file is the git blob id of its LFS pointer.
    printf -v pointer 'version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %s\n' \
      "$whole" "$3"
    expect "Hub blob id" "$5" "$(printf 'blob %s\0%s' ${#pointer} "$pointer" | digest 1 || :)"
    expect sha256 "$4" "$whole"
  fi
  [[ -z $flaw ]]
}

is_free() { # PATH: a file may be put there; fails after a finding
  if [[ ! -e $1 || -f $1 ]]; then return 0; fi
  finding "$1" "something in the way" "a plain file or nothing" "something else" "move it away"
  return 1
}

remove_leftovers() { # FINAL: the partials of runs that were killed, not those of live ones
  local left pid
  for left in "$1".recombine-partial.*; do
    pid=${left##*.}
    # Not by exit code: a process of somebody else is alive, though kill fails.
    if [[ $pid != "$$" && $(kill -0 "$pid" 2>&1) != *"No such process"* ]]; then continue; fi
    if is_free "$left"; then rm -f "$left" || die 7 "$left: cannot be removed, see above"; fi
  done
}

choose_work() { # sets work: the rows of the artifacts to write
  local row path size whole blob final
  work=''
  while IFS= read -r row; do
    IFS=$'\t' read -r _ _ path size whole blob <<<"$row"
    final=$staging/$path
    remove_leftovers "$final"
    if ! is_free "$final"; then continue; fi
    if [[ -r $final ]] && prove "$final" "$path" "$size" "$whole" "$blob"; then
      printf '%s\n' "$final: already right, kept ($size bytes, $proof)"
    else
      work+=$row$'\n'
    fi
  done <<<"$(rows artifact)"
  stop_on_findings
}

check_space() { # df counts in KiB; the file that is replaced stays until the new one is proven
  local dir=$staging kib free
  while [[ ! -d $dir ]]; do dir=$(dirname "$dir"); done
  kib=$(awk -F '\t' '{ kib += int($4 / 1024) + 1 } END { printf "%.0f", kib }' <<<"${work%$'\n'}")
  free=$(df -Pk "$dir" | awk '{ for (i = 4; i < NF; i++) if ($i ~ /^[0-9]+%$/) {
    print $(i - 1); exit } }') || free='' # when df cannot say, writing will
  if ((${free:-$kib} < kib)); then
    die 7 "$dir: no space: expected $kib KiB free, found $free KiB, $((kib - free)) KiB too few; \
nothing was written -> free some, or choose one format"
  fi
}

advise_sources() { # where no part is here
  local folders repo revision path
  folders=$(rows piece | awk -F '\t' '{ sub("/[^/]*$", "/", $4) } !seen[$4]++ { printf "%s ", $4 }')
  say "recombine.sh: no part of $model is here -> copy the parts to ${folders}or, in a clone" \
    "that has them, git lfs pull"
  IFS=$'\t' read -r _ repo revision <<<"$(awk -F '\t' '$1 == "hub"' <<<"$table")"
  if [[ -z $repo ]]; then return 0; fi
  say "Or accept the terms at https://huggingface.co/$repo, log in with hf auth login, and get" \
    "a whole file for make weights MODEL=$model:"
  while IFS=$'\t' read -r _ _ path _; do
    say "  hf download $repo '$path' --revision $revision --local-dir '$staging'"
  done <<<"$(rows artifact)"
}

partial=''
trap 'if [[ -n $partial ]]; then rm -f "$partial"; fi' EXIT
trap 'say "recombine.sh: interrupted; what was there before is as it was"; exit 130' INT TERM HUP

join_parts() { # ARTIFACT: its parts to stdout, in the order of the manifest
  local path part
  while IFS=$'\t' read -r _ _ path part _; do
    if [[ $path == "$1" ]]; then cat "$part" || return 1; fi
  done <<<"$(rows piece)"
}

assemble() { # ARTIFACT SIZE SHA256 BLOB_ID
  local final=$staging/$1
  say "writing $final"
  partial=$final.recombine-partial.$$
  if ! { mkdir -p "$(dirname "$final")" && join_parts "$1" >"$partial" && sync; }; then
    die 7 "$final: cannot be written, see above; the partial file was removed"
  fi
  if ! prove "$partial" "$@"; then
    die 4 "$final: wrong content: expected $flaw. Every part was right, so the disk or memory \
failed, or $manifest is wrong; the result was removed -> git checkout $manifest, then run again"
  fi
  if [[ -d $final ]]; then # mv would move into it
    die 4 "$final: something in the way: a directory; the result was removed -> move it away"
  fi
  mv -f "$partial" "$final" || die 7 "$final: cannot be replaced, see above"
  partial=''
  printf '%s\n' "$final: assembled ($2 bytes, $proof)"
}

model=csm-1b format='' list=''
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --list) list=yes ;;
    --model=*) model=${1#*=} ;;
    --model) model=${2-}; if (($# > 1)); then shift; fi ;;
    *)
      if [[ $1 == -* || -n $format ]]; then usage >&2; die 1 "cannot use \"$1\" here"; fi
      format=$1 ;;
  esac
  shift
done

self=${BASH_SOURCE[0]}
while [[ -L $self ]]; do # macOS before 12.3 has no readlink -f
  cd -P "$(dirname "$self")"
  self=$(readlink "${self##*/}")
done
cd -P "$(dirname "$self")"
manifest=manifests/$model.toml
if [[ $model == -* || $model == *[^A-Za-z0-9._-]* || ! -r $manifest ]]; then
  die 1 "no model \"$model\": there is no $manifest"
fi
table=$(read_manifest)
if grep '^bad' <<<"$table" | cut -f 2 >&2; then
  die 4 "the manifest cannot be understood; nothing was written -> git checkout $manifest"
fi
staging=$(awk -F '\t' '$1 == "staging" { print $2 }' <<<"$table")
destination=$(awk -F '\t' '$1 == "destination" { print $2 }' <<<"$table")
formats=$(awk -F '\t' '$1 == "artifact" && !seen[$2]++ { printf "%s ", $2 }' <<<"$table")
if [[ $list ]]; then rows piece | cut -f 3-; exit; fi

if [[ -z $format ]]; then
  here=$(rows piece | while IFS=$'\t' read -r _ group _ part _; do
    if [[ -e $part || -L $part ]]; then printf '%s ' "$group"; fi
  done)
  if [[ -z $here ]]; then advise_sources; exit 3; fi
  formats=$here
elif [[ $format != all ]]; then
  if [[ " $formats" != *" $format "* ]]; then
    die 1 "no format \"$format\"; $model has: $formats"
  fi
  formats=$format
fi

check_parts
choose_work
if [[ $work ]]; then
  check_space
  while IFS=$'\t' read -r _ _ path size whole blob; do
    assemble "$path" "$size" "$whole" "$blob"
  done <<<"${work%$'\n'}"
  sync # the new names too
fi
say "Next: make weights MODEL=$model puts the files in place and checks them. Without Python:"
while IFS=$'\t' read -r _ _ path _; do
  say "  mkdir -p '$(dirname "$destination/$path")' && mv '$staging/$path' '$destination/$path'"
done <<<"$(rows artifact)"
