# The summary as a table in Markdown: a line per (part, measure, state), a column per setup.
def hundredths: . * 100 | round / 100 | tostring;
def cell: if . == null then "" else
    (.seconds * 1000 | if . < 100 then . * 10 | round / 10 else round end | tostring) as $ms
    | if .setup == "overlayfs" then $ms
      else (.ratio | hundredths) as $ratio
        | (if .cpu_ratio then ", cpu \(.cpu_ratio | hundredths)" else "" end) as $cpu
        | (if .met == null then "\($ratio)\($cpu)"
           elif .met then "**\($ratio)** (<= \(.target)\($cpu))"
           else "\($ratio) (MISSED: <= \(.target)\($cpu))" end) end
    end;

["| part | measure | state | overlayfs ms | fuse | file | tree | memory |", "|---|---|---|---|---|---|---|---|"]
+ (reduce .rows[] as $row ([];
    (map(.part == $row.part and .measure == $row.measure and .state == $row.state) | index(true)) as $at
    | if $at == null then . + [{part: $row.part, measure: $row.measure, state: $row.state, setups: {($row.setup): $row}}]
      else .[$at].setups[$row.setup] = $row end)
   | map("| \(.part) | \(.measure) | \(.state) | \(.setups.overlayfs | cell) | \(.setups.fuse | cell) | \(.setups.file | cell) | \(.setups.tree | cell) | \(.setups.memory | cell) |"))
| .[]
