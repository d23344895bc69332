# A picture of a matrix: one bar for each row, its parts the phases until ready. Each image of each profile has a scale of its own, in which its
# slowest row is as long as the picture is wide.
def colour: {pull: "#4a6fa5", create: "#c28f2c", run: "#6a9a5b"};
def rounded: . * 100 | round / 100;

18 as $height | 620 as $wide | 210 as $left
| [.rows | group_by([.profile, .image])[] | {title: "\(.[0].profile), \(.[0].image)", rows: ., most: ([.[].ready] | max)}] as $groups
| (reduce $groups[] as $group ({y: 40, parts: []};
    .y as $top
    | .parts += ["<text x=\"8\" y=\"\($top + 13)\" font-weight=\"bold\">\($group.title)</text>"]
    | .y += $height
    | reduce $group.rows[] as $row (.;
        .y as $y | ($wide / $group.most) as $scale
        | ($left + $row.pull * $scale) as $second | ($second + $row.create * $scale) as $third
        | .parts += [
            "<text x=\"20\" y=\"\($y + 13)\">\($row.snapshotter), \($row.format)</text>",
            "<rect x=\"\($left)\" y=\"\($y + 2)\" width=\"\($row.pull * $scale)\" height=\"13\" fill=\"\(colour.pull)\"/>",
            "<rect x=\"\($second)\" y=\"\($y + 2)\" width=\"\($row.create * $scale)\" height=\"13\" fill=\"\(colour.create)\"/>",
            "<rect x=\"\($third)\" y=\"\($y + 2)\" width=\"\($row.run * $scale)\" height=\"13\" fill=\"\(colour.run)\"/>",
            "<text x=\"\($left + $row.ready * $scale + 6)\" y=\"\($y + 13)\">\($row.ready | rounded) s (\($row.ratio | rounded))</text>"
          ]
        | .y += $height)
    | .y += 8)) as $drawn
| "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"\($drawn.y + 10)\" font-family=\"sans-serif\" font-size=\"12\">",
  "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>",
  "<text x=\"8\" y=\"22\">Seconds from the pull until ready: <tspan fill=\"\(colour.pull)\">pull</tspan>, <tspan fill=\"\(colour.create)\">create</tspan>, <tspan fill=\"\(colour.run)\">run</tspan>; in brackets: part of overlayfs</text>",
  $drawn.parts[],
  "</svg>"
