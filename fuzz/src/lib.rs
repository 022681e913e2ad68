//! What the fuzz targets share: a bound on allocations, a folder for files, checks of what the readers return, and
//! mutators that keep checksums and lengths right.
//!
//! A reader passes if it returns data that agrees with itself, or an error of one sentence. Panics, overflows, failed
//! assertions, an allocation over [`LARGEST`] and a run over the time limit are faults.

mod bundle;
mod memory;
mod mutate;
mod seeds;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{self, Dataset};
use ddpm_cuda::device::Device;
use ddpm_cuda::params::{Params, Specs};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::unet::UNet;

pub use bundle::{bundle, parts};
pub use memory::LARGEST;
pub use mutate::{ddpms, jpegs, messages, pngs, safetensors, tables, tars, zips};
pub use seeds::{Seeds, Table, encoded, idx, jpeg, npy, npz, offer, png, table, tar};

/// The folder of this process, on a file system in memory if there is one.
pub fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // run.sh makes TMPDIR such a file system and removes it; a target that is run alone leaves its folder there.
        let folder = std::env::temp_dir().join(format!("ddpm-cuda-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the files of this process");
        folder
    })
}

/// Writes `bytes` to `name` in the scratch folder and returns its path.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    let folder = path.parent().expect("below the scratch folder");
    std::fs::create_dir_all(folder).expect("a folder in the scratch folder");
    std::fs::write(&path, bytes).expect("a file in the scratch folder");
    path
}

/// Writes the parts of `input` under `names`; what has no part, or an empty one, does not exist.
pub fn files(input: &[u8], names: &[&str]) {
    let mut parts = parts(input);
    for name in names {
        match parts.next() {
            Some(bytes) if !bytes.is_empty() => drop(file(name, bytes)),
            _ => drop(std::fs::remove_file(scratch().join(name))),
        }
    }
}

/// A message for users is one sentence of readable length. File names and values from a file must not break that.
pub fn assert_sentence(message: &impl Display) {
    let text = message.to_string();
    assert!(!text.is_empty() && !text.ends_with('.'), "a sentence without a period: {text:?}");
    assert!(!text.contains(char::is_control), "control characters: {text:?}");
    assert!(text.chars().count() <= 2000, "{} characters: {text:?}", text.chars().count());
    for word in ["panicked", "unwrap()", "RUST_BACKTRACE", "internal error"] {
        assert!(!text.contains(word), "speaks of a fault in the program: {text:?}");
    }
}

/// Reads a data set as it is, then as a run would with settings of its own, and checks what comes back.
pub fn read_data(path: &Path) {
    let preset = Config::preset(Preset::Mnist);
    let source = path.to_str().expect("a path in UTF-8").to_string();
    let mut as_it_is = Config { data: source.clone(), held_out: 0.0, ..preset.clone() };
    (as_it_is.model.image_size, as_it_is.model.channels) = (Size::DATA, 0);
    let read = load(&mut as_it_is);

    let mut fitted = Config { data: source, held_out: 0.5, ..preset };
    (fitted.model.image_size, fitted.model.channels, fitted.model.classes) = (Size { h: 4, w: 6 }, 3, 10);
    let fitted = load(&mut fitted);
    if let (None, Some(data)) = (&read, &fitted) {
        // Only images of several sizes, in a folder, an archive or a table, have none of their own.
        let archive = path.extension().is_some_and(|ending| ["zip", "tar", "parquet"].iter().any(|of| ending == *of));
        assert!(path.is_dir() || archive, "{} images, which could not be read as they are", data.train.len());
    }
}

fn load(config: &mut Config) -> Option<data::Data> {
    let asked = config.model.clone();
    let data = data::load(config).inspect_err(|e| assert_sentence(e)).ok()?;
    data.notes.iter().for_each(|note| assert_sentence(note));
    assert!(!data.train.is_empty(), "nothing to train on");
    for set in [&data.train, &data.held_out] {
        assert_consistent(set);
        let (extent, model) = (set.extent(), &config.model);
        assert!(set.is_empty() || (extent.size, extent.channels) == (model.image_size, model.channels));
        let labels = set.labels().unwrap_or_default();
        assert!(asked.classes == 0 || labels.iter().all(|&label| (label as usize) < asked.classes));
    }
    assert!(asked.image_size == Size::DATA || asked.image_size == config.model.image_size);
    assert!(asked.channels == 0 || asked.channels == config.model.channels);
    Some(data)
}

fn assert_consistent(set: &Dataset) {
    let (images, extent) = (set.images(), set.extent());
    assert_eq!(images.pixels.len(), images.shape.len(), "bytes of all images");
    assert_eq!((images.shape.h, images.shape.w, images.shape.c), (extent.size.h, extent.size.w, extent.channels));
    assert!(set.labels().is_none_or(|labels| labels.len() == set.len()), "a label for each image");
    for index in 0..set.len() {
        assert_eq!(set.image(index).len(), extent.len(), "bytes of image {index}");
    }
}

/// The smallest network that has every kind of layer, and its settings.
pub fn network() -> (Config, UNet, Specs) {
    let mut config = Config::preset(Preset::Mnist);
    let model = &mut config.model;
    (model.image_size, model.widths, model.groups) = (Size::square(4), vec![4, 4], 2);
    (model.attention_resolutions, model.classes) = (vec![2], 3);
    let (unet, specs) = UNet::new(&config.model).expect("a network that can be built");
    (config, unet, specs)
}

/// A checkpoint of [`network`] below the scratch folder, from which targets take files.
pub fn checkpoint() -> PathBuf {
    let (config, _, specs) = network();
    let device = Device::cpu();
    let params = || Params::init(&device, specs.clone(), 1).expect("host memory");
    let moments = || Tensor::zeros(&device, Shape::vector(specs.flat_len())).expect("host memory");
    let (params, ema, m, v) = (params(), params(), moments(), moments());
    let state = ddpm_cuda::checkpoint::State {
        step: 7,
        params: &params,
        ema: ema.flat(),
        m: &m,
        v: &v,
        data: None,
        importance: None,
        curve: None,
    };
    ddpm_cuda::checkpoint::save(&scratch().join("saved"), &config, state).expect("a checkpoint")
}

/// A file of [`checkpoint`].
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
