//! The logs of a run folder and its samples, as `report` and `watch` read them, and the page that is made of them.

#![no_main]

use ddpm_cuda::config::{Config, Preset};
use ddpm_cuda::history::History;
use ddpm_cuda::report;
use ddpm_cuda_fuzz::{Seeds, assert_sentence, bundle, file, files, offer, scratch};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 3] = ["run/metrics.jsonl", "run/events.jsonl", "run/samples/5.png"];

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    file("run/config.toml", Config::preset(Preset::Mnist).to_toml().as_bytes());
    file("run/samples/4.png", b"");
    files(bytes, &NAMES);
    let run = History::read(&scratch().join("run")).expect("settings are all that a run folder must have");
    run.faults.iter().for_each(|fault| assert_sentence(fault));
    for curve in &run.metrics.curves {
        assert!(curve.points.is_sorted_by(|a, b| a.step < b.step), "steps grow: {curve:?}");
        assert!(curve.points.iter().all(|point| point.value.is_finite()), "numbers: {curve:?}");
    }
    let _ = (run.state(), run.step(), run.seconds_per_step());
    for page in [report::page(&[run.clone()]), report::page(&[run.clone(), run])] {
        // What a file holds is text in the page.
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script").count(), 2);
        assert!(!page.contains("<!--"));
    }
});

fn seeds() -> Seeds {
    let metrics = b"{\"step\":1,\"loss\":0.5,\"loss_by_quarter\":[1,null,0.5,0.25],\"elapsed_s\":0.5}\n\
                    {\"step\":2,\"loss\":0.25,\"validation_loss\":0.5,\"elapsed_s\":1.5,\"</script>\":1}\n";
    let events = b"{\"time\":\"2026-01-01T00:00:00Z\",\"step\":0,\"event\":\"start\",\"steps\":9,\"host\":\"a\"}\n\
                   {\"time\":\"2026-01-01T00:00:01Z\",\"step\":1,\"event\":\"warning\",\"text\":\"<!--\"}\n\
                   {\"time\":\"2026-01-01T00:00:02Z\",\"step\":2,\"event\":\"checkpoint\"}\n\
                   {\"time\":\"2026-01-01T00:00:03Z\",\"step\":2,\"event\":\"end\",\
                   \"how\":\"failed\",\"text\":\"x\"}\n";
    let words = ["\"step\":", "\"event\":", "\"note\"", "\"how\":\"done\"", "1e308", "4294967295", "null", "<script>"];
    Seeds {
        inputs: vec![bundle(&[metrics, events, b""]), bundle(&[b"", events, b""])],
        words: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
    }
}
