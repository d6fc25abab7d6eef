#!/usr/bin/env bash
# run_all.sh SECONDS: every target at once, one thread each; ends of the logs in fuzz/logs.
set -euo pipefail
cd "$(dirname "$0")"
seconds="${1:?seconds per target}"
cargo +nightly fuzz build --release
mkdir -p logs
# No search for leaks: rayon's threads, which never end, are reported as some.
for target in $(cargo +nightly fuzz list); do
    mkdir -p "corpus/$target" "artifacts/$target"
    "target/$(rustc -vV | sed -n 's/^host: //p')/release/$target" "corpus/$target" -dict=corpus/options.dict \
        -max_len=8192 -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -detect_leaks=0 \
        -artifact_prefix="artifacts/$target/" -print_final_stats=1 > "logs/$target.txt" 2>&1 &
done
wait
grep -H "stat::number_of_executed_units" logs/*.txt
find artifacts -type f
