//! `train --config FILE`, and a run's config.toml.

#![no_main]

use ddpm_cuda::config::{Config, Preset, SETTINGS};
use ddpm_cuda_fuzz::{Seeds, assert_sentence, file, offer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    match Config::read(&file("config.toml", bytes)) {
        Err(error) => assert_sentence(&error),
        Ok(config) => {
            if let Err(error) = config.validate() {
                assert_sentence(&error);
            }
            let text = config.to_toml();
            let again = Config::read(&file("again.toml", text.as_bytes()));
            let again = again.unwrap_or_else(|e| panic!("what is written is read again: {e}\n{text}"));
            // As text, since a number that is none does not equal itself.
            assert_eq!(again.to_toml(), text, "settings survive the file");
            assert!(again == config || text.contains("nan"), "{again:?} instead of {config:?}");
        }
    }
});

fn seeds() -> Seeds {
    let presets = [Preset::Mnist, Preset::Cifar10, Preset::CelebaHq256];
    let mut inputs: Vec<Vec<u8>> = presets.map(|preset| Config::preset(preset).to_toml().into_bytes()).to_vec();
    inputs.push(b"widths = [32, 64]\nimage_size = \"28x20\"\ndata = \"a\\nb\"\n".to_vec());
    inputs.push(b"[table]\nsteps = 1_000\n# comment\nseed = 0xFF\n".to_vec());
    let keys = SETTINGS.iter().map(|setting| format!("{} = ", setting.key));
    let values =
        ["true", "[]", "1e400", "nan", "-inf", "1979-05-27", "\"cosine\"", "18446744073709551615", "'''", "\"\"\""];
    let words = keys.chain(values.map(String::from)).map(String::into_bytes).collect();
    Seeds { inputs, words }
}
