from tests.steps.test_cluster import *
from tests.steps.test_cluster import _upstream
def test_all(mlflow_server, small_home):
    doc=document("keras-adhoc"); doc["objective"]={"metric":"top1","max_drop":20,"confidence":0.9}; doc["recipes"]={"pruned":["prune","quantize"]}; doc["quantize"]["epochs"]=0
    spec=spec_of(doc); outs=[]
    def go(name, cell=None):
        ups=[o for o in outs]
        given=StepInput(run_key="adhoc",pipeline_run_id="",cell=cell,upstream=flow.upstream(name,spec,cell,outs),params={})
        try: o=run_step(name,spec,given)
        except Exception as e: print("FAIL",name,cell,type(e),e); raise
        outs.append(o); print(name,cell.key if cell else "",o.metrics,flush=True); return o
    go("check"); go("retrain"); c=Cell(recipe="pruned"); go("prune",c); go("quantize",c)
    for t in spec.targets:
        for r in ("baseline","pruned"): go("build",Cell(recipe=r,target=t))
    t="edge"
    for r in ("baseline","pruned"):
        try: go("validate",Cell(recipe=r,target=t))
        except Exception as e: print(r,e)
