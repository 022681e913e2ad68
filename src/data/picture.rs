//! Decoding one image: PNG, JPEG, WebP, TIFF, BMP or GIF, of several frames or pages the first. Transparency is laid
//! over a background, 16 bits become 8, and EXIF orientation is applied; grey images have one channel, all others
//! three.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use num_traits::{PrimInt, Unsigned};

use super::{Extent, jpeg};
use crate::config::{Background, Size};

/// Bytes of a decoded image: the limit of the `image` crate, a 13,000 x 13,000 photograph. Several are decoded at once.
const LARGEST: u64 = 512 << 20;

/// Bytes that an image of a few bytes may decode to where its format does not bound what a byte can become.
const LARGEST_OF_FEW: u64 = 64 << 20;

/// Endings of the files that are read.
pub const READ: [&str; 11] = ["png", "jpg", "jpeg", "jfif", "jpe", "pjpeg", "webp", "tif", "tiff", "bmp", "gif"];

/// What is read, for a sentence.
pub const KINDS: &str = "PNG, JPEG, WebP, TIFF, BMP or GIF";

/// Why a file cannot be used.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The end of a sentence that begins with the file.
    pub sentence: String,
    /// The same in few words, for a list.
    pub short: String,
}

impl Fault {
    /// A file that is damaged.
    pub fn broken(why: impl std::fmt::Display) -> Fault {
        let short = why.to_string().replace('\n', " ");
        Fault { sentence: format!("is not a whole image: {short}"), short }
    }
}

/// The kind of picture that these first bytes of a file are.
pub fn kind(start: &[u8]) -> Option<&'static str> {
    let at = |from: usize, magic: &[u8]| start.get(from..from + magic.len()) == Some(magic);
    Some(match start {
        _ if at(0, b"\x89PNG\r\n\x1a\n") => "PNG",
        _ if at(0, b"\xFF\xD8\xFF") => "JPEG",
        _ if at(0, b"RIFF") && at(8, b"WEBP") => "WebP",
        _ if at(0, b"GIF8") => "GIF",
        // Two letters alone might begin a text; the reserved bytes behind the size are zero.
        _ if at(0, b"BM") && at(6, &[0; 4]) => "BMP",
        _ if at(0, b"II*\0") || at(0, b"MM\0*") => "TIFF",
        _ if at(4, b"ftypavif") || at(4, b"ftypavis") => "AVIF",
        _ if at(4, b"ftyphei") || at(4, b"ftyphev") || at(4, b"ftypmif1") => "HEIC",
        _ if at(0, b"\xFF\x0A") || at(4, b"JXL ") => "JPEG XL",
        _ if at(4, b"jP  ") => "JPEG 2000",
        _ if at(0, b"8BPS") => "Photoshop",
        _ => return None,
    })
}

/// The format of a kind that is read.
fn format(kind: &str) -> Option<ImageFormat> {
    Some(match kind {
        "PNG" => ImageFormat::Png,
        "JPEG" => ImageFormat::Jpeg,
        "WebP" => ImageFormat::WebP,
        "TIFF" => ImageFormat::Tiff,
        "BMP" => ImageFormat::Bmp,
        "GIF" => ImageFormat::Gif,
        _ => return None,
    })
}

/// True for a file that begins like an image that is read.
pub fn is_readable(file: &Path) -> bool {
    let mut start = [0; 16];
    let read = File::open(file).and_then(|mut f| f.read(&mut start)).unwrap_or(0);
    kind(&start[..read]).and_then(format).is_some()
}

/// Size and channels of the image in a file, without decoding it.
pub fn header(file: &Path, background: Background) -> Result<Extent, Fault> {
    header_of(BufReader::new(File::open(file).map_err(unreadable)?), background)
}

/// The same of an image elsewhere.
pub fn header_of(image: impl BufRead + Seek, background: Background) -> Result<Extent, Fault> {
    let (decoder, orientation) = decoder(image)?;
    let (w, h) = decoder.dimensions();
    Ok(extent(w, h, decoder.color_type(), orientation, background))
}

/// An image, and what became of it.
pub struct Picture {
    /// Its size and channels.
    pub extent: Extent,
    /// `(h, w, c)`.
    pub pixels: Vec<u8>,
    /// True if a pixel was not wholly opaque.
    pub transparent: bool,
    /// Smallest and largest value, if there were 16 bits.
    pub deep: Option<(u16, u16)>,
    /// True for a progressive JPEG whose last scans are not there.
    pub unfinished: bool,
}

/// Decodes the image in a file.
pub fn decode(file: &Path, background: Background) -> Result<Picture, Fault> {
    decode_bytes(&std::fs::read(file).map_err(unreadable)?, background)
}

/// Decodes an image.
pub fn decode_bytes(bytes: &[u8], background: Background) -> Result<Picture, Fault> {
    let (decoder, orientation) = decoder(Cursor::new(bytes))?;
    let (w, h) = decoder.dimensions();
    // DEFLATE makes at most 1032 bytes of one, and a pixel of a PNG takes at least a bit. So does a block of 64 pixels
    // of a JPEG; jpeg::check knows better, but leaves what it does not understand to the decoder, which makes room
    // first. What WebP and GIF can make of a byte is not bounded, or hardly; more than is common is refused if it is
    // large.
    let large = kind(bytes) == Some("PNG") || decoder.total_bytes() > LARGEST_OF_FEW;
    let of_a_bit = if kind(bytes) == Some("JPEG") { 64 } else { 1032 };
    if u64::from(w) * u64::from(h) > of_a_bit * 8 * bytes.len() as u64 && large {
        return Err(Fault::broken(format!("{} bytes are too few for {h}x{w} pixels", bytes.len())));
    }
    if matches!(decoder.color_type(), ColorType::Rgb32F | ColorType::Rgba32F) {
        let sentence = "holds numbers with a fraction, whose range nothing says; save it with 8 or 16 bits".into();
        return Err(Fault { sentence, short: "numbers with a fraction".into() });
    }
    let unfinished = kind(bytes) == Some("JPEG") && jpeg::check(bytes).map_err(Fault::broken)?;
    let extent = extent(w, h, decoder.color_type(), orientation, background);
    let mut image = DynamicImage::from_decoder(decoder).map_err(Fault::broken)?;
    let deep = depth(&image);
    let transparent = lay_over(&mut image, background);
    image.apply_orientation(orientation);
    let pixels = if extent.channels == 1 { image.into_luma8().into_raw() } else { image.into_rgb8().into_raw() };
    Ok(Picture { extent, pixels, transparent, deep, unfinished })
}

/// A file that cannot be read.
pub fn unreadable(e: std::io::Error) -> Fault {
    Fault { sentence: format!("cannot be read: {e}"), short: e.to_string() }
}

/// A decoder behind its header, and the orientation of the image.
fn decoder<'a>(mut file: impl BufRead + Seek + 'a) -> Result<(impl ImageDecoder + 'a, Orientation), Fault> {
    let start = file.fill_buf().map_err(unreadable)?;
    let format = match kind(start) {
        Some(kind) => format(kind).ok_or_else(|| Fault {
            sentence: format!("is an image of the kind {kind}, which is not read; convert it to PNG or JPEG"),
            short: format!("{kind} image"),
        })?,
        None if start.is_empty() => return Err(Fault::broken("it is empty")),
        None if start.starts_with(b"version https://git-lfs") => {
            return Err(Fault::broken("it is a pointer of Git LFS; fetch its content with git lfs pull"));
        }
        None if start.trim_ascii_start().starts_with(b"<") => {
            return Err(Fault::broken("it is a web page or the like"));
        }
        None => return Err(Fault::broken("it does not begin like one")),
    };
    let mut decoder = ImageReader::with_format(file, format).into_decoder().map_err(Fault::broken)?;
    let (w, h) = decoder.dimensions();
    if decoder.total_bytes() > LARGEST {
        let sentence = format!(
            "is too large: {h}x{w} are {} MiB when decoded, and the most that is read is {} MiB; shrink it first",
            decoder.total_bytes() >> 20,
            LARGEST >> 20
        );
        return Err(Fault { sentence, short: format!("too large with {h}x{w}") });
    }
    if format == ImageFormat::Gif {
        // A frame may claim a size of its own, for which the decoder makes room; it lies within the screen.
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(decoder.total_bytes() + (1 << 20));
        decoder.set_limits(limits).map_err(Fault::broken)?;
    }
    let orientation = decoder.orientation().map_err(Fault::broken)?;
    Ok((decoder, orientation))
}

fn extent(w: u32, h: u32, color: ColorType, orientation: Orientation, background: Background) -> Extent {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let turned = matches!(orientation, Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH);
    let (h, w) = if turned { (w as usize, h as usize) } else { (h as usize, w as usize) };
    let grey = match color {
        ColorType::L8 | ColorType::L16 => true,
        // A coloured background shows through.
        ColorType::La8 | ColorType::La16 => background.is_grey(),
        _ => false,
    };
    Extent { size: Size { h, w }, channels: if grey { 1 } else { 3 } }
}

/// Smallest and largest value of an image of 16 bits, its transparency aside.
fn depth(image: &DynamicImage) -> Option<(u16, u16)> {
    let (values, channels, colours): (&[u16], usize, usize) = match image {
        DynamicImage::ImageLuma16(image) => (image, 1, 1),
        DynamicImage::ImageLumaA16(image) => (image, 2, 1),
        DynamicImage::ImageRgb16(image) => (image, 3, 3),
        DynamicImage::ImageRgba16(image) => (image, 4, 3),
        _ => return None,
    };
    let pixels = values.chunks_exact(channels);
    Some(pixels.flat_map(|p| &p[..colours]).fold((u16::MAX, 0), |(least, most), &v| (least.min(v), most.max(v))))
}

/// Lays an image over the background, and returns whether a pixel was not wholly opaque. The transparency is still
/// there, for the conversion to drop.
fn lay_over(image: &mut DynamicImage, background: Background) -> bool {
    if image.color().has_alpha() && !image.color().has_color() && !background.is_grey() {
        *image = match std::mem::take(image) {
            deep @ DynamicImage::ImageLumaA16(_) => deep.into_rgba16().into(),
            image => image.into_rgba8().into(),
        };
    }
    let under = background.0.map(u64::from);
    match image {
        DynamicImage::ImageLumaA8(image) => over(image, 2, under),
        DynamicImage::ImageRgba8(image) => over(image, 4, under),
        DynamicImage::ImageLumaA16(image) => over(image, 2, under.map(|b| 257 * b)),
        DynamicImage::ImageRgba16(image) => over(image, 4, under.map(|b| 257 * b)),
        _ => false,
    }
}

/// round(c a + b (1 - a)) for the colours c of each pixel, in the image's own depth; the last channel is a. True if
/// some a is below 1.
fn over<T: PrimInt + Unsigned>(values: &mut [T], channels: usize, under: [u64; 3]) -> bool {
    let wide = |value: T| value.to_u64().expect("8 or 16 bits");
    let opaque = wide(T::max_value());
    let mut some = false;
    for pixel in values.chunks_exact_mut(channels) {
        let (alpha, colours) = pixel.split_last_mut().expect("a pixel has channels");
        let a = wide(*alpha);
        some |= a < opaque;
        for (c, b) in colours.iter_mut().zip(under) {
            let mixed = (wide(*c) * a + b * (opaque - a) + opaque / 2) / opaque;
            *c = T::from(mixed).expect("between two values of this depth");
        }
    }
    some
}

#[cfg(test)]
mod tests {
    use super::over;

    /// Against the formula in f64, for every opacity; the smallest and largest values stay themselves.
    #[test]
    fn colours_are_laid_over_the_background_and_rounded() {
        for (c, a) in (0..=255u8).step_by(5).flat_map(|c| (0..=255u8).map(move |a| (c, a))) {
            let want = |c: f64, b: f64| (c * f64::from(a) / 255.0 + b * (1.0 - f64::from(a) / 255.0)).round();
            let mut pixel = [c, 255 - c, 7, a];
            assert_eq!(over(&mut pixel, 4, [255, 0, 100]), a < 255);
            let c = f64::from(c);
            let wanted = [want(c, 255.0), want(255.0 - c, 0.0), want(7.0, 100.0), f64::from(a)];
            assert_eq!(pixel.map(f64::from), wanted, "{c} with opacity {a}");
            let mut deep = [257 * c as u16, 257 * u16::from(a)];
            over(&mut deep, 2, [257 * 255; 3]);
            assert!((f64::from(deep[0]) / 257.0 - want(c, 255.0)).abs() <= 0.5 + 1e-2, "{c} with {a}: {deep:?}");
        }
    }
}
