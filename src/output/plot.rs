//! Plots of lines and points, and of bars, as SVG and as PNG.
//!
//! Both are drawn by plotters from the same description, with a font of its own for the PNG, so that a machine without
//! fonts draws the same. Deliberately absent: other kinds of plots, interaction, styles.

use std::ops::Range;
use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::{png, write_atomically};
use crate::error::{Error, Result};

/// An axis of a plot.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with its unit.
    pub label: String,
    /// Logarithmic: values of 0 and below are left out.
    pub log: bool,
}

/// A line of a plot, or some points.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend; with a single unnamed line there is no legend.
    pub name: String,
    /// x and y; what is not finite is left out.
    pub points: Vec<(f64, f64)>,
    /// Whether a line joins them; otherwise each has a mark.
    pub line: bool,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Its title.
    pub title: String,
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical axis.
    pub y: Axis,
    /// The lines.
    pub series: Vec<Series>,
    /// Whether each point of a line has a mark.
    pub marks: bool,
}

/// A chart of groups of horizontal bars, the first on top.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Its title.
    pub title: String,
    /// What the bars' lengths are, with their unit.
    pub label: String,
    /// What the bars of each group are, in the legend; one colour each.
    pub kinds: Vec<String>,
    /// For each group its name and a length of each kind, from 0.
    pub groups: Vec<(String, Vec<f64>)>,
}

/// Pixels of the PNG, and units of the SVG.
const SIZE: (u32, u32) = (880, 560);

/// Colours that stay apart for most colour-blind eyes (Okabe and Ito 2008).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(130, 130, 130),
];

/// Writes `folder/stem.svg` and `folder/stem.png`; returns both paths.
///
/// # Errors
/// `Error::File` if a file cannot be written.
pub fn write_plot(folder: &Path, stem: &str, plot: &Plot) -> Result<[PathBuf; 2]> {
    write(folder, stem, |area| draw(&area, plot), |area| draw(&area, plot))
}

/// The same for a chart of bars.
///
/// # Errors
/// As [`write_plot`].
pub fn write_bars(folder: &Path, stem: &str, chart: &Bars) -> Result<[PathBuf; 2]> {
    write(folder, stem, |area| bars(&area, chart), |area| bars(&area, chart))
}

/// Writes what is drawn on an area of either kind.
fn write(
    folder: &Path,
    stem: &str,
    on_svg: impl FnOnce(DrawingArea<SVGBackend<'_>, Shift>) -> Text<()>,
    on_pixels: impl FnOnce(DrawingArea<BitMapBackend<'_>, Shift>) -> Text<()>,
) -> Result<[PathBuf; 2]> {
    let [svg, picture] = ["svg", "png"].map(|ending| folder.join(format!("{stem}.{ending}")));
    let failed = |e: String| Error::Failed(format!("the plot {stem} cannot be drawn: {e}"));
    // A repeated registration changes nothing.
    register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| failed("the built-in font cannot be read".into()))?;
    let mut text = String::new();
    on_svg(SVGBackend::with_string(&mut text, SIZE).into_drawing_area()).map_err(failed)?;
    write_atomically(&svg, text.as_bytes())?;
    let (w, h) = (SIZE.0 as usize, SIZE.1 as usize);
    let mut pixels = vec![255; 3 * w * h];
    on_pixels(BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area()).map_err(failed)?;
    write_atomically(&picture, &png(&picture, h, w, 3, &pixels)?)?;
    Ok([svg, picture])
}

type Text<T> = std::result::Result<T, String>;

fn draw<B: DrawingBackend>(area: &DrawingArea<B, Shift>, plot: &Plot) -> Text<()> {
    let seen = |log: bool, v: f64| v.is_finite() && (!log || v > 0.0);
    let shown = |&(x, y): &(f64, f64)| seen(plot.x.log, x) && seen(plot.y.log, y);
    let series: Vec<Vec<(f64, f64)>> =
        plot.series.iter().map(|s| s.points.iter().copied().filter(shown).collect()).collect();
    let of = |axis: &Axis, value: fn(&(f64, f64)) -> f64| range(axis.log, series.iter().flatten().map(value));
    let (x, y) = (of(&plot.x, |p| p.0), of(&plot.y, |p| p.1));
    match (plot.x.log, plot.y.log) {
        (false, false) => lines(area, plot, &series, x, y),
        (true, false) => lines(area, plot, &series, x.log_scale(), y),
        (false, true) => lines(area, plot, &series, x, y.log_scale()),
        (true, true) => lines(area, plot, &series, x.log_scale(), y.log_scale()),
    }?;
    area.present().map_err(|e| e.to_string())
}

/// The corner with the fewest points, for the legend.
fn emptiest(plot: &Plot, points: &[Vec<(f64, f64)>], x: &Range<f64>, y: &Range<f64>) -> SeriesLabelPosition {
    let middle = |log: bool, range: &Range<f64>| match log {
        true => (range.start * range.end).sqrt(),
        false => (range.start + range.end) / 2.0,
    };
    let (x, y) = (middle(plot.x.log, x), middle(plot.y.log, y));
    let count = |right: bool, upper: bool| {
        points.iter().flatten().filter(|point| (point.0 > x) == right && (point.1 > y) == upper).count()
    };
    let corners = [
        (count(true, true), SeriesLabelPosition::UpperRight),
        (count(false, true), SeriesLabelPosition::UpperLeft),
        (count(true, false), SeriesLabelPosition::LowerRight),
        (count(false, false), SeriesLabelPosition::LowerLeft),
    ];
    corners.into_iter().min_by_key(|(points, _)| *points).expect("there are corners").1
}

/// The values with a margin of a twentieth; something of width 1 around none or one of them.
fn range(log: bool, values: impl Iterator<Item = f64>) -> Range<f64> {
    let scale = |v: f64| if log { v.ln() } else { v };
    let back = |v: f64| if log { v.exp() } else { v };
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for v in values.map(scale) {
        (low, high) = (low.min(v), high.max(v));
    }
    if low > high {
        (low, high) = (0.0, 0.0);
    }
    let margin = if low == high { 0.5 } else { (high - low) / 20.0 };
    back(low - margin)..back(high + margin)
}

fn lines<B: DrawingBackend, X: AsRangedCoord<Value = f64>, Y: AsRangedCoord<Value = f64>>(
    area: &DrawingArea<B, Shift>,
    plot: &Plot,
    series: &[Vec<(f64, f64)>],
    x: X,
    y: Y,
) -> Text<()>
where
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let failed = |e: DrawingAreaErrorKind<B::ErrorType>| e.to_string();
    let legend = {
        let of = |axis: &Axis, value: fn(&(f64, f64)) -> f64| range(axis.log, series.iter().flatten().map(value));
        emptiest(plot, series, &of(&plot.x, |p| p.0), &of(&plot.y, |p| p.1))
    };
    area.fill(&WHITE).map_err(failed)?;
    let mut chart = ChartBuilder::on(area)
        .caption(&plot.title, ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(x, y)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc(&plot.x.label)
        .y_desc(&plot.y.label)
        .axis_desc_style(("sans-serif", 18))
        .label_style(("sans-serif", 15))
        .x_label_formatter(&|v| number(*v))
        .y_label_formatter(&|v| number(*v))
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (k, (points, series)) in series.iter().zip(&plot.series).enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        if series.line {
            let line =
                chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2))).map_err(failed)?;
            if !series.name.is_empty() {
                let sample = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2));
                line.label(&series.name).legend(sample);
            }
        }
        if plot.marks || !series.line {
            let size = if series.line { 3 } else { 5 };
            let marks = points.iter().map(|&point| Circle::new(point, size, colour.filled()));
            let marks = chart.draw_series(marks).map_err(failed)?;
            if !series.line && !series.name.is_empty() {
                let sample = move |(x, y)| Circle::new((x + 10, y), 5, colour.filled());
                marks.label(&series.name).legend(sample);
            }
        }
    }
    if plot.series.iter().any(|series| !series.name.is_empty()) {
        chart
            .configure_series_labels()
            .label_font(("sans-serif", 15))
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .position(legend)
            .draw()
            .map_err(failed)?;
    }
    Ok(())
}

fn bars<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Bars) -> Text<()> {
    const NAMES: i32 = 260;
    let failed = |e: DrawingAreaErrorKind<B::ErrorType>| e.to_string();
    let (groups, kinds) = (chart.groups.len().max(1), chart.kinds.len().max(1));
    let longest = chart.groups.iter().flat_map(|(_, lengths)| lengths).copied().filter(|v| v.is_finite());
    let longest = longest.fold(0.0, f64::max);
    let end = if longest > 0.0 { 1.05 * longest } else { 1.0 };
    area.fill(&WHITE).map_err(failed)?;
    let mut plot = ChartBuilder::on(area)
        .caption(&chart.title, ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(0.0..end, groups as f64..0.0)
        .map_err(failed)?;
    plot.configure_mesh()
        .x_desc(&chart.label)
        .axis_desc_style(("sans-serif", 18))
        .label_style(("sans-serif", 15))
        .x_label_formatter(&|v| number(*v))
        .disable_y_mesh()
        .y_labels(0)
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (k, kind) in chart.kinds.iter().enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        // The bars of a group fill four fifths of its height.
        let height = 0.8 / kinds as f64;
        let bar = |(group, (_, lengths)): (usize, &(String, Vec<f64>))| {
            let top = group as f64 + 0.1 + k as f64 * height;
            let length = lengths.get(k).copied().filter(|v| v.is_finite()).unwrap_or(0.0);
            Rectangle::new([(0.0, top), (length, top + height)], colour.filled())
        };
        let drawn = plot.draw_series(chart.groups.iter().enumerate().map(bar)).map_err(failed)?;
        let sample = move |(x, y)| Rectangle::new([(x, y - 5), (x + 20, y + 5)], colour.filled());
        drawn.label(kind).legend(sample);
    }
    let style = ("sans-serif", 15).into_text_style(area).pos(Pos::new(HPos::Right, VPos::Center));
    for (group, (name, _)) in chart.groups.iter().enumerate() {
        let (x, y) = plot.backend_coord(&(0.0, group as f64 + 0.5));
        area.draw(&plotters::element::Text::new(name.as_str(), (x - 8, y), style.clone())).map_err(failed)?;
    }
    plot.configure_series_labels()
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .position(SeriesLabelPosition::LowerRight)
        .draw()
        .map_err(failed)?;
    area.present().map_err(|e| e.to_string())
}

/// A number beside an axis: whole numbers and short decimals as they are, very small and large ones as powers.
fn number(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        size if !(1e-3..1e6).contains(&size) => format!("{v:.0e}"),
        // Ticks are computed by adding, so the last digits are rounding.
        _ => format!("{}", (v * 1e6).round() / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(log: bool, points: Vec<(f64, f64)>) -> Plot {
        let axis = |label: &str| Axis { label: label.into(), log };
        let series = vec![Series { name: "curve".into(), points, line: true }];
        Plot { title: "title".into(), x: axis("across"), y: axis("up"), series, marks: true }
    }

    #[test]
    fn both_files_are_written_and_say_what_they_show() {
        let folder = tempfile::tempdir().unwrap();
        for (stem, log) in [("linear", false), ("log", true)] {
            let _ = stem;
            let points = (0..20).map(|i| (f64::from(i), f64::from(i * i))).collect();
            let [svg, png] = write_plot(folder.path(), stem, &plot(log, points)).unwrap();
            let text = std::fs::read_to_string(svg).unwrap();
            assert!(["title", "across", "up", "curve"].iter().all(|word| text.contains(word)), "{text}");
            let picture = image::open(png).unwrap().to_rgb8();
            assert_eq!(picture.dimensions(), SIZE);
            let drawn = picture.pixels().filter(|p| p.0 == [0, 114, 178]).count();
            assert!(drawn > 200, "{drawn} pixels of the line");
            // The title's letters are drawn without any font of the system.
            let title = picture.enumerate_pixels().filter(|(_, y, p)| *y < 50 && p.0[0] < 128).count();
            assert!(title > 20, "{title} dark pixels in the title");
        }
    }

    #[test]
    fn nothing_and_numbers_that_are_none_are_plotted_too() {
        let folder = tempfile::tempdir().unwrap();
        for points in [vec![], vec![(1.0, f64::NAN), (0.0, 1.0)], vec![(2.0, 2.0)], vec![(f64::INFINITY, -1.0)]] {
            for log in [false, true] {
                write_plot(folder.path(), "few", &plot(log, points.clone())).unwrap();
            }
        }
    }

    #[test]
    fn points_have_marks_and_the_legend_leaves_them_alone() {
        let folder = tempfile::tempdir().unwrap();
        let points = |from: i32| (from..from + 9).map(|i| (f64::from(i), f64::from(i))).collect();
        let mut plot = plot(false, points(0));
        plot.series[0].line = false;
        plot.marks = false;
        let series = [points(0)];
        let corner = emptiest(&plot, &series, &(0.0..8.0), &(0.0..8.0));
        assert!(matches!(corner, SeriesLabelPosition::UpperLeft), "{corner:?}");
        let [svg, _] = write_plot(folder.path(), "points", &plot).unwrap();
        let text = std::fs::read_to_string(svg).unwrap();
        assert_eq!(text.matches("<circle").count(), 9 + 1, "nine points and the legend's");
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let folder = tempfile::tempdir().unwrap();
        let groups = vec![("first".into(), vec![4.0, 2.0]), ("second".into(), vec![1.0, f64::NAN])];
        let kinds = vec!["one".into(), "two".into()];
        let chart = Bars { title: "title".into(), label: "ms".into(), kinds, groups };
        let [svg, png] = write_bars(folder.path(), "bars", &chart).unwrap();
        let text = std::fs::read_to_string(svg).unwrap();
        assert!(["title", "ms", "one", "two", "first", "second"].iter().all(|word| text.contains(word)), "{text}");
        let picture = image::open(png).unwrap().to_rgb8();
        let pixels = |row: u32, colour: RGBColor| {
            let of_row = (0..SIZE.0).filter(|x| picture.get_pixel(*x, row).0 == [colour.0, colour.1, colour.2]);
            of_row.count() as f64
        };
        let longest = |rows: Range<u32>, colour: RGBColor| rows.map(|row| pixels(row, colour)).fold(0.0, f64::max);
        // Groups fill the height from top to bottom; the legend is at the bottom right.
        let (upper, lower) = (60..250, 300..380);
        let [four, two] = [0, 1].map(|k| longest(upper.clone(), COLOURS[k]));
        let one = longest(lower, COLOURS[0]);
        assert!((four / two - 2.0).abs() < 0.05 && (four / one - 4.0).abs() < 0.1, "{four} {two} {one}");
        write_bars(folder.path(), "none", &Bars { groups: Vec::new(), kinds: Vec::new(), ..chart }).unwrap();
    }

    #[test]
    fn numbers_beside_axes_are_short() {
        assert_eq!([0.0, 0.30000000000000004, 1000.0, 2e-5, 3e7].map(number), ["0", "0.3", "1000", "2e-5", "3e7"]);
    }
}
